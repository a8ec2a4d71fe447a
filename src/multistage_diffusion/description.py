"""What a run's network is made of, stage by stage."""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .config import RunConfig, SamplingConfig
from .nets.cost import network_cost, weighted_multiply_adds
from .samplers import make_plan
from .schedules import NoiseSchedule

if TYPE_CHECKING:
    from .report_page import ArchitectureRow


def describe(config: RunConfig, sampling: SamplingConfig | None = None) -> dict[str, Any]:
    """Return what a run's network is made of, per stage, as JSON-able data.

    Parameters are of the network a stage uses (shared encoder and its own decoder); multiply-adds count convolutions in
    the paper's convention, FLOPs are twice all multiply-adds, both for one image and one call. `calls` is how often the
    sampler of `sampling` (default: the run's) calls each stage.

    Raises:
        ValueError: if the configuration has no image shape yet.
    """
    if len(config.data.shape) != 3:
        raise ValueError(f"data.shape={list(config.data.shape)} must be [channels, height, width]")
    _, height, width = config.data.shape
    cost = network_cost(config.network, height, width)
    schedule, stages = config.diffusion.schedule, config.stages
    plan = make_plan(sampling or config.sampling, schedule)
    calls = [0] * len(stages)
    for sigma in plan.calls:
        calls[stages.index_of(sigma)] += 1
    return {
        "name": config.name,
        "family": config.network.family,
        "shape": list(config.data.shape),
        "encoder_width": config.network.encoder_width,
        "parameters": cost.total_parameters,
        "shared_parameters": cost.shared_parameters,
        "shared_multiply_adds": cost.shared_multiply_adds,
        "multiply_adds_by_calls": weighted_multiply_adds(cost, [c / sum(calls) for c in calls]),
        "stages": [
            {
                "stage": k + 1,
                "decoder_width": config.network.decoder_widths[k],
                "sigma": [low, high if math.isfinite(high) else None],
                "t": [edge_time(schedule, low), edge_time(schedule, high)],
                "parameters": cost.stages[k].parameters,
                "multiply_adds": cost.stages[k].multiply_adds,
                "flops": cost.stages[k].true_flops,
                "calls": calls[k],
            }
            for k in range(len(stages))
            for low, high in [stages.interval(k)]
        ],
    }


def edge_time(schedule: NoiseSchedule, sigma: float) -> float:
    """Return the time of a stage edge; the open ends are those of the schedule."""
    if sigma <= 0:
        return 0.0
    return schedule.edge_time(sigma) if math.isfinite(sigma) else schedule.t_max


def architecture_rows(described: dict[str, Any]) -> list[ArchitectureRow]:
    """Return a description as the lines of a report's table."""
    from .report_page import ArchitectureRow  # matplotlib takes a while to import

    rows = [
        ArchitectureRow(
            name=f"stage {s['stage']}",
            parameters=s["parameters"],
            multiply_adds=s["multiply_adds"],
            width=s["decoder_width"],
            sigma=(s["sigma"][0], math.inf if s["sigma"][1] is None else s["sigma"][1]),
            t=tuple(s["t"]),
        )
        for s in described["stages"]
    ]
    if described["shared_parameters"]:
        rows.append(
            ArchitectureRow(
                name="shared encoder",
                parameters=described["shared_parameters"],
                multiply_adds=described["shared_multiply_adds"],
                width=described["encoder_width"],
            )
        )
    return [*rows, ArchitectureRow(name="whole network", parameters=described["parameters"])]


def description_table(described: dict[str, Any]) -> str:
    """Return a description as a text table."""
    table = Table(
        title=f"{described['name']}: {described['family']}, images {' x '.join(map(str, described['shape']))}"
    )
    for column in ("", "sigma", "t", "width", "parameters", "multiply-adds", "calls"):
        table.add_column(column, justify="left" if column in ("", "sigma", "t") else "right")
    for stage in described["stages"]:
        low, high = stage["sigma"]
        table.add_row(
            f"stage {stage['stage']}",
            f"[{low:.4g}, {'inf' if high is None else format(high, '.4g')})",
            f"[{stage['t'][0]:.4g}, {stage['t'][1]:.4g})",
            str(stage["decoder_width"]),
            f"{stage['parameters'] / 1e6:.3g} M",
            f"{stage['multiply_adds'] / 1e9:.4g} G",
            str(stage["calls"]),
        )
    if described["shared_parameters"]:
        table.add_row(
            "shared encoder",
            "",
            "",
            str(described["encoder_width"]),
            f"{described['shared_parameters'] / 1e6:.3g} M",
            f"{described['shared_multiply_adds'] / 1e9:.4g} G",
            "",
        )
    table.add_row(
        "whole network",
        "",
        "",
        "",
        f"{described['parameters'] / 1e6:.3g} M",
        f"{described['multiply_adds_by_calls'] / 1e9:.4g} G per call",
        str(sum(s["calls"] for s in described["stages"])),
    )
    buffer = io.StringIO()
    Console(file=buffer, width=120).print(table)
    return buffer.getvalue().rstrip()
