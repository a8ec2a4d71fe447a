"""What a run's network is made of, stage by stage."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
    calls = calls_per_stage(config, sampling)
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


def calls_per_stage(config: RunConfig, sampling: SamplingConfig | None = None) -> list[int]:
    """Return how often a sampler (default: the run's) calls each stage, lowest noise first."""
    calls = [0] * len(config.stages)
    for sigma in make_plan(sampling or config.sampling, config.diffusion.schedule).calls:
        calls[config.stages.index_of(sigma)] += 1
    return calls


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
    if described["shared_parameters"] and len(rows) > 1:
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
    """Return a description as a text table, at most 80 columns wide."""
    stages = described["stages"]
    rows = [["", "sigma", "t", "width", "params, M", "mult-adds, M", "calls"]]
    for stage in stages:
        low, high = stage["sigma"]
        interval = f"[{low:.3g}, {'inf' if high is None else format(high, '.3g')})"
        times = f"[{stage['t'][0]:.3g}, {stage['t'][1]:.3g})"
        size = [f"{stage['parameters'] / 1e6:.4g}", f"{stage['multiply_adds'] / 1e6:.5g}"]
        rows.append(
            [f"stage {stage['stage']}", interval, times, str(stage["decoder_width"]), *size, str(stage["calls"])]
        )
    if described["shared_parameters"] and len(stages) > 1:
        size = [f"{described['shared_parameters'] / 1e6:.4g}", f"{described['shared_multiply_adds'] / 1e6:.5g}"]
        rows.append(["encoder", "", "", str(described["encoder_width"]), *size, ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 3 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    mean, calls = described["multiply_adds_by_calls"] / 1e6, sum(stage["calls"] for stage in stages)
    return "\n".join(
        [
            f"{described['name']}: {described['family']}, images {' x '.join(map(str, described['shape']))}",
            "",
            *(line.rstrip() for line in lines),
            "",
            f"whole network: {described['parameters'] / 1e6:.4g} M parameters; {mean:.5g} M multiply-adds per call",
            f"(mean over the {calls} calls of the sampler; a stage's figures include its encoder)",
        ]
    )
