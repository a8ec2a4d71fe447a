"""Planning a model: stage edges from the data, decoder widths from two short probes and a budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import RunConfig
from ..config.serialization import override, to_dict
from ..errors import UserError
from ..escaping import counted
from ..files import write_json
from ..performance.devices import resolve_device
from ..planning import (
    Budget,
    PlannedStage,
    counted_gain,
    decoder_flops,
    halfway_shares,
    ideal_flops,
    mean_flops,
    probe_widths,
    reasons,
)
from ..progress import Progress
from ..reporting.describe import calls_per_stage
from ..shares import prior_masses, stage_shares, stage_weights
from ..stage_finding import StageResult, StageSettings
from .probes import optimal_losses, probed
from .resolve import PreparedRun, ResolvedRun, open_new, resolve_run
from .stages import find_stages as find

FEW_STEPS = 100  # of a probe, below which its gains say little
Edges = Literal["optimal", "gaussian", "even"]
Bars = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan: the configuration to train, and the reasons for it.

    Attributes:
        config: configuration of the run to train.
        base: name of the configuration it was made from.
        edges_from: source of the edges, e.g. "algorithm 1", or "given stages".
        density: whether the training density is the base's ("given") or proposed from the images ("auto").
        budget: mean forward FLOPs of a call of the network that were requested, over the stages' shares of the cost.
        flops: the same of the planned network; `flops_encoder` is the encoder's part.
        sampling_weight: see `plan`.
        probe_widths: decoder widths of the two probes, narrow and wide.
        probe_steps: training steps of each probe.
        held_out_rows: rows per stage on which the probes were compared.
        stages: lowest noise first.
        sentences: the reasons as text.
    """

    config: RunConfig
    base: str
    edges_from: str
    density: Literal["given", "auto"]
    budget: float
    flops: float
    flops_encoder: int
    sampling_weight: float
    probe_widths: tuple[int, int]
    probe_steps: int
    held_out_rows: int
    stages: tuple[PlannedStage, ...]
    sentences: tuple[str, ...]

    def explained(self) -> dict[str, Any]:
        """Return everything but the configuration as JSON-compatible data."""
        data: dict[str, Any] = to_dict(self)
        return {name: value for name, value in data.items() if name != "config"}

    def save(self, out: Path) -> None:
        """Write the configuration as JSON, and the explanation beside it."""
        write_json(out, self.config)  # first: the reasons alone would be in the way of the next plan
        write_json(explained_file(out), self.explained())


def explained_file(out: Path) -> Path:
    """Return the path of a plan's explanation: plan.explained.json beside plan.json."""
    return out.with_suffix(".explained.json")


def plan(
    config: RunConfig,
    *,
    result: StageResult | None = None,
    stages: int = 3,
    edges: Edges = "optimal",
    density: Literal["given", "auto"] = "given",
    budget: float | None = None,
    sampling_weight: float = 0.0,
    probe_steps: int = 300,
    out: Path | str | None = None,
    device: str | None = None,
    bar: Bars | None = None,
) -> Planned:
    """Propose edges, decoder widths and, if asked, the training density for a data set and a budget.

    Args:
        config: the base; its data, encoder, depth, noise and training are kept.
        result: the result whose edges are used; None finds them.
        stages: number of stages to find.
        edges: how they are found: from the "optimal" denoiser (Algorithm 1 for three stages, 2 for other numbers), from the
            "gaussian" one, or "even" in the time of the VP kernel.
        density: "given": the base's; "auto": ln sigma normal, with mean and standard deviation proposed from the images.
        budget: mean forward FLOPs of a call (2 per multiply-add, encoder included), each stage counted by its share of
            the cost; None: that of the base's network.
        sampling_weight: 0 (training alone) to below 1: a stage's share of the cost is 1 - sampling_weight times its share of
            the training rows plus sampling_weight times its share of the sampler's calls.
        probe_steps: training steps of each of the two probes.
        out: where to write the configuration as JSON, with the explanation beside it.
        device: default CUDA when there is one.
        bar: makes a progress display, called with (done, total), from a title.

    Raises:
        UserError: if something does not fit, before any probe is trained; or if both probes have the same losses.
    """
    bar = bar or _no_bar
    _check_arguments(config, budget, sampling_weight, probe_steps)
    place, data = resolve_device(device), open_new(config.data)
    before = resolve_run(config, data, None, place)  # refuses what does not fit before stages are found
    if not len(before.images[1]):
        raise UserError("data.held_out=0: a plan compares losses on held-out images; give a share such as 0.1")
    size = (before.config.input_shape[1], before.config.input_shape[2])
    if budget is None:
        budget = mean_flops(before.config.network, _cost_shares(before.config, sampling_weight), size)
    settings, edges_from = _SETTINGS[edges](stages), "given stages"
    if result is None:
        edges_from = _NAMES[edges].format(**settings)
    if density == "auto":
        proposed = _found(before, _SETTINGS["gaussian"](stages) | {"density": "auto"}, device, bar)
        assert proposed.diffusion is not None
        config = override(config, {"diffusion.prior": proposed.diffusion.prior})
        before = resolve_run(config, data, None, place)
        result = proposed if result is None and edges == "gaussian" else result  # cut over that density
    if result is None:
        result = _found(before, settings, device, bar)
    run = resolve_run(_staged(config, result), data, result, place)
    shares = _cost_shares(run.config, sampling_weight)
    limits, widths = Budget.of(budget, run.config.network, shares, size), probe_widths(run.config.network)
    with bar("encoding") as progress:
        prepared = run.encoded(place, progress)
    with bar("probing") as progress:
        narrow, wide = probed(prepared, widths, probe_steps, place, progress)
    found = _planned_stages(prepared, limits, widths, narrow, wide, place)
    # "auto" stays: the precision is chosen on the device that trains
    chosen = {
        "network.decoder_widths": [stage.width for stage in found],
        **{f"network.{name}": [stage.others[name] for stage in found] for name in found[0].others},
        "training.precision": config.training.precision,
    }
    made = override(prepared.config, chosen)
    flops = mean_flops(made.network, shares, size)
    planned = Planned(
        config=made,
        base=config.name,
        edges_from=edges_from,
        density=density,
        budget=budget,
        flops=flops,
        flops_encoder=limits.encoder,
        sampling_weight=sampling_weight,
        probe_widths=widths,
        probe_steps=probe_steps,
        held_out_rows=len(narrow[0]),
        stages=tuple(found),
        sentences=tuple([*reasons(found, budget, flops), *_few(probe_steps)]),
    )
    if out is not None:
        planned.save(Path(out))
    return planned


# Of each way to find edges: the settings for a number of stages, and its name in a plan
_SETTINGS: dict[Edges, Callable[[int], dict[str, Any]]] = {
    "optimal": lambda stages: {"algorithm": 1 if stages == 3 else 2, "stages": stages},
    "gaussian": lambda stages: {"algorithm": 2, "denoiser": "gaussian", "stages": stages},
    "even": lambda stages: {"algorithm": "timestep", "stages": stages},
}
_NAMES: dict[Edges, str] = {
    "optimal": "algorithm {algorithm}",
    "gaussian": "Gaussian denoiser",
    "even": "even in VP time",
}


def _found(before: ResolvedRun, settings: Mapping[str, Any], device: str | None, bar: Bars) -> StageResult:
    """Find the stages of a run's training images or latents, for its density and preconditioning."""
    with bar("finding stages") as progress:
        return find(
            before.images[0],
            StageSettings(**settings),
            schedule=before.config.diffusion.schedule,
            diffusion=before.config.diffusion,
            codec=before.config.codec if before.codec is not None else None,
            device=device,
            progress=progress,
        )


def _few(probe_steps: int) -> list[str]:
    """Return a warning of probes that hardly train."""
    if probe_steps >= FEW_STEPS:
        return []
    return [
        f"Probes of {counted(probe_steps, 'step')} hardly train: take 300 (--probe-steps) before you trust their gains."
    ]


def _no_bar(title: str) -> AbstractContextManager[Progress]:
    def nothing(done: int, total: int) -> None:
        """Show nothing."""

    return nullcontext(nothing)


def _check_arguments(config: RunConfig, budget: float | None, sampling_weight: float, probe_steps: int) -> None:
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"budget={budget / 1e6:g} MFLOPs must be positive and finite")
    if not 0 <= sampling_weight < 1:
        raise UserError(f"sampling-weight={sampling_weight:g} must be at least 0 and below 1")
    if probe_steps < 1:
        raise UserError(f"probe-steps={probe_steps} must be positive")
    if not config.data.source:
        raise UserError("data.source is empty: name the images that the plan is for")
    if config.training.branch_at:
        raise UserError(
            f"training.branch_at={config.training.branch_at} lets stages share a decoder, but a plan compares decoders that "
            "are trained apart; set it to 0"
        )


def _shares(config: RunConfig) -> tuple[float, ...]:
    return stage_shares(config.training, config.stages, config.diffusion.prior)


def _cost_shares(config: RunConfig, sampling_weight: float) -> tuple[float, ...]:
    """Return the share with which each stage's FLOPs count: of the rows and of the sampler's calls, weighted; they sum to 1."""
    calls = calls_per_stage(config)
    return tuple(
        (1 - sampling_weight) * share + sampling_weight * count / sum(calls)
        for share, count in zip(_shares(config), calls, strict=True)
    )


def _staged(config: RunConfig, result: StageResult) -> RunConfig:
    """Return a configuration with the stages found, one decoder per stage, and shares of rows as numbers.

    Raises:
        UserError: if they do not fit it, or a stage gets no rows.
    """
    stages, shares = result.stages(), config.training.shares
    if not isinstance(shares, tuple) or len(shares) != len(stages):
        shares = halfway_shares(prior_masses(stages, config.diffusion.prior))
    if not all(shares):
        raise UserError(f"training.shares={list(shares)}: a plan needs rows of every stage; give each a share above 0")
    largest = {f"network.{name}": value for name, value in config.network.largest_decoders(len(stages)).items()}
    return override(config, {"stages": stages, "training.shares": shares, **largest})


def _planned_stages(
    prepared: PreparedRun,
    limits: Budget,
    widths: tuple[int, int],
    narrow: Sequence[Tensor],
    wide: Sequence[Tensor],
    device: torch.device,
) -> list[PlannedStage]:
    """Return the stages with their gains, and with the decoders chosen for these gains and the budget.

    Args:
        prepared: the data that the probes were trained on.
        limits: the budget.
        widths: decoder widths of the probes, narrow and wide.
        narrow, wide: losses of the same held-out rows, per stage.
        device: where the optimal denoiser is computed.
    """
    config = prepared.config
    size = (config.input_shape[1], config.input_shape[2])
    weights = stage_weights(config.training, config.stages, config.diffusion.prior)
    optimal = optimal_losses(prepared, device)
    rows, calls = _shares(config), calls_per_stage(config)
    known: list[dict[str, Any]] = []
    for k, (few, many) in enumerate(zip(narrow, wide, strict=True)):
        flops = [decoder_flops(config.network, k, width, size) or 0 for width in widths]
        difference, span = few - many, math.log(flops[1] / flops[0])
        gain = float(difference.mean()) / span
        error = float(difference.std()) / math.sqrt(len(difference)) / span
        low, high = config.stages.interval(k)
        known.append(
            {
                "stage": k + 1,
                "sigma": (low, high if math.isfinite(high) else None),
                "share": rows[k],
                "calls": calls[k],
                "cost_share": limits.shares[k],
                "weight": weights[k],
                "loss_narrow": float(few.mean()),
                "loss_wide": float(many.mean()),
                "loss_optimal": optimal[k],
                "flops_narrow": flops[0],
                "flops_wide": flops[1],
                "gain": gain,
                "gain_error": error,
                "gain_counted": counted_gain(gain, error),
            }
        )
    worth = [stage["weight"] * stage["gain_counted"] for stage in known]
    if not sum(worth) > 0:
        raise UserError("probe-steps: both probes have the same losses; give more steps, such as --probe-steps 300")
    ideal = ideal_flops(worth, limits.shares, limits.flops - limits.encoder)
    chosen = limits.choose(worth)
    assert chosen is not None  # Budget would have raised
    return [
        PlannedStage(**stage, flops_ideal=flops, width=option.width, flops=option.flops, others=dict(option.others))
        for stage, flops, option in zip(known, ideal, chosen, strict=True)
    ]
