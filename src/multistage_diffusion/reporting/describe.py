"""Describes a run's network, stage by stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, SamplingConfig
from ..config.run import require_config
from ..config.sampling import SOLVERS
from ..errors import UserError
from ..nets.cost import network_cost, weighted_multiply_adds
from ..samplers import make_plan
from ..schedules import NoiseSchedule
from ..shares import stage_training

if TYPE_CHECKING:
    from .report import ArchitectureRow


def describe(config: RunConfig, sampling: SamplingConfig | None = None) -> dict[str, Any]:
    """Return a description of a run's network, per stage, as JSON-compatible data.

    Parameters are those of the network that a stage uses (shared encoder and its own decoder). Multiply-adds count
    what the family's publications count (the paper: convolutions). FLOPs are twice all multiply-adds. Both are for one
    image and one call.
    Means over the stages are given twice. `by_length` weights each stage by `length`, the share of the schedule's time
    range in its interval (as the totals of the paper's Tables 7 and 9). `by_calls` weights it by `calls`, the number of
    calls by the sampler of `sampling` (default: the run's).
    A stage's "training" holds its shares of noise, rows, steps (see `StageTraining`) and FLOPs ("compute").

    Raises:
        UserError: if the configuration has no image or latent shape yet.
    """
    require_config(config)
    shape, field = config.input_shape, "codec.shape" if config.codec.used else "data.shape"
    if len(shape) != 3:
        raise UserError(f"{field}={list(shape)} must be [channels, height, width]")
    cost = network_cost(config.network, *shape[1:])
    schedule, stages = config.diffusion.schedule, config.stages
    calls = calls_per_stage(config, sampling)
    times = [
        (edge_time(schedule, low), edge_time(schedule, high)) for low, high in map(stages.interval, range(len(stages)))
    ]
    lengths = [(end - start) / schedule.t_max for start, end in times]
    flops = [stage.true_flops for stage in cost.stages]
    training = _training(config, flops)
    return {
        "name": config.name,
        "family": config.network.family,
        "input": "latents" if config.codec.used else "images",
        "shape": list(shape),
        "encoder_width": None if config.network.separate else config.network.encoder_width,
        "parameters": cost.total_parameters,
        "shared_parameters": cost.shared_parameters,
        "shared_multiply_adds": cost.shared_multiply_adds,
        "shared_flops": cost.shared_true_flops,
        "multiply_adds_by_length": weighted_multiply_adds(cost, lengths),
        "multiply_adds_by_calls": weighted_multiply_adds(cost, calls),
        "flops_by_length": _weighted_mean(flops, lengths),
        "flops_by_calls": _weighted_mean(flops, calls),
        "sampler": sampler_settings(sampling or config.sampling, sum(calls)),
        "schedule": schedule.kind,
        "stages": [
            {
                "stage": k + 1,
                "decoder_width": config.network.decoder_widths[k],
                "notes": config.network.notes(k),
                "sigma": [low, high if math.isfinite(high) else None],
                "t": list(times[k]),
                "length": lengths[k],
                "parameters": cost.stages[k].parameters,
                "multiply_adds": cost.stages[k].multiply_adds,
                "flops": cost.stages[k].true_flops,
                "calls": calls[k],
                "training": training[k],
            }
            for k in range(len(stages))
            for low, high in [stages.interval(k)]
        ],
    }


def _weighted_mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """Return the mean of one value per stage; only the ratios of the weights matter."""
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def sampler_settings(sampling: SamplingConfig, calls: int) -> dict[str, Any]:
    """Return a sampler's settings as JSON-compatible data; method and order are None for solvers without a choice."""
    solver = SOLVERS[sampling.solver]
    return {
        "solver": sampling.solver,
        "method": sampling.method if solver.methods else None,
        "order": sampling.order if solver.orders else None,
        "calls": calls,
        "spacing": sampling.spacing,
    }


def sampler_words(settings: dict[str, Any]) -> str:
    """Return a sampler's settings as text, e.g. "20 calls of dpm, singlestep, order 3, log-snr spacing"."""
    order = settings["order"] and f"order {settings['order']}"
    solver = ", ".join(filter(None, [settings["solver"], settings["method"], order]))
    return f"{settings['calls']} calls of {solver}, {settings['spacing']} spacing"


def calls_per_stage(config: RunConfig, sampling: SamplingConfig | None = None) -> list[int]:
    """Return the number of calls of each stage by a sampler (default: the run's), lowest noise first."""
    calls = [0] * len(config.stages)
    for sigma in make_plan(sampling or config.sampling, config.diffusion.schedule).calls:
        calls[config.stages.index_of(sigma)] += 1
    return calls


def sampling_flops(config: RunConfig, sampling: SamplingConfig | None = None) -> int:
    """Return the true FLOPs of sampling one image by a sampler (default: the run's), without guidance."""
    cost = network_cost(config.network, *config.input_shape[1:])
    return sum(n * stage.true_flops for n, stage in zip(calls_per_stage(config, sampling), cost.stages, strict=True))


def edge_time(schedule: NoiseSchedule, sigma: float) -> float:
    """Return the time of a stage edge; sigma = 0 gives 0, and sigma = inf the schedule's t_max."""
    if sigma <= 0:
        return 0.0
    return schedule.edge_time(sigma) if math.isfinite(sigma) else schedule.t_max


def architecture_rows(described: dict[str, Any]) -> list[ArchitectureRow]:
    """Return a description as the rows of a report's table."""
    from .report import ArchitectureRow  # matplotlib takes a while to import

    rows = [
        ArchitectureRow(
            name=f"stage {s['stage']}",
            parameters=s["parameters"],
            multiply_adds=s["multiply_adds"],
            width=s["decoder_width"],
            **s["training"],
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
    unit, letter = (1e9, "G") if max(stage["multiply_adds"] for stage in stages) >= 1e9 else (1e6, "M")
    rows = [["", "sigma", "t", "width", "params, M", f"mult-adds, {letter}", "calls"]]
    for stage in stages:
        interval = _interval(*stage["sigma"])
        times = f"[{stage['t'][0]:.3g}, {stage['t'][1]:.3g})"
        size = [f"{stage['parameters'] / 1e6:.4g}", f"{stage['multiply_adds'] / unit:.5g}"]
        rows.append(
            [f"stage {stage['stage']}", interval, times, str(stage["decoder_width"]), *size, str(stage["calls"])]
        )
    if described["shared_parameters"] and len(stages) > 1:
        size = [f"{described['shared_parameters'] / 1e6:.4g}", f"{described['shared_multiply_adds'] / unit:.5g}"]
        rows.append(["encoder", "", "", str(described["encoder_width"]), *size, ""])
    by_calls, by_length = (described[f"multiply_adds_by_{weights}"] / unit for weights in ("calls", "length"))
    return "\n".join(
        [
            f"{described['name']}: {described['family']}, {described['input']} {' x '.join(map(str, described['shape']))}",
            "",
            *_columns(rows, left=3),
            "",
            *_columns(_training_rows([s["training"] for s in stages]), left=1),
            "",
            *[f"decoder {stage['stage']}: {note}" for stage in stages for note in stage["notes"]],
            *[""] * any(stage["notes"] for stage in stages),
            f"whole network: {described['parameters'] / 1e6:.4g} M parameters; mean multiply-adds of a call:",
            f"  {by_calls:.5g} {letter} over {sampler_words(described['sampler'])}",
            f"  {by_length:.5g} {letter} over times uniform in t",
            "(a stage's figures include its encoder)",
        ]
    )


def _training(config: RunConfig, flops: Sequence[int]) -> list[dict[str, float]]:
    """Return each stage's shares of the training, see `StageTraining`, and of its FLOPs ("compute").

    Args:
        config: the run's.
        flops: of a stage for one row.
    """
    trained = stage_training(config.training, config.stages, config.diffusion.prior)
    compute = [share.rows * each for share, each in zip(trained, flops, strict=True)]
    return [{**s._asdict(), "compute": each / sum(compute)} for s, each in zip(trained, compute, strict=True)]


def training_table(config: RunConfig) -> str:
    """Return what each stage gets of the training as a text table: shares of noise, rows, steps and compute.

    Args:
        config: with the shape of its images or latents.
    """
    flops = [stage.true_flops for stage in network_cost(config.network, *config.input_shape[1:]).stages]
    sigma = ["sigma", *(_interval(*config.stages.interval(k)) for k in range(len(config.stages)))]
    rows = [
        [first, cell, *rest]
        for (first, *rest), cell in zip(_training_rows(_training(config, flops)), sigma, strict=True)
    ]
    return "\n".join(_columns(rows, left=2))


def _training_rows(training: Sequence[dict[str, float]]) -> list[list[str]]:
    """Return the table of what each stage gets of the training."""
    names = ("noise", "rows", "steps", "compute")
    lines = [[f"stage {k}", *(f"{shares[name]:.1%}" for name in names)] for k, shares in enumerate(training, start=1)]
    return [["training", *names], *lines]


def _interval(low: float, high: float | None) -> str:
    """Return a stage's range of sigma as text; None is infinity."""
    return f"[{low:.3g}, {math.inf if high is None else high:.3g})"


def _columns(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Return rows as lines of aligned columns, the first `left` of them to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(w) if i < left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
