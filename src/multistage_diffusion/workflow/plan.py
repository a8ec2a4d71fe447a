"""Planning a model: stage edges from the data, decoder widths from two short probes and a budget."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import EvaluationConfig, RunConfig
from ..config.serialization import to_dict
from ..data import open_configured, to_float
from ..denoisers import MultiStageDenoiser
from ..errors import UserError
from ..files import write_json
from ..optimal import OptimalDenoiser
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
from ..preconditioning import make_preconditioning
from ..progress import Progress
from ..stage_finding import StageResult, StageSettings
from ..training.batches import Batch, TrainingData, held_out_batch, prior_masses, stage_shares, stage_weights
from ..training.callbacks import Callback
from ..training.losses import row_losses
from ..training.run import Run
from ..training.trainer import Trainer
from .latent import with_codec, with_stages
from .prepare import PreparedRun, check, prepare, with_paths
from .stages import find_stages as find

ROWS = 1024  # least held-out rows of a stage; fewer give large errors of the gains
MEMORY = 2 << 30  # most bytes of training images, as floats, for an optimal denoiser
Bars = Callable[[str], AbstractContextManager[Progress]]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A plan: the configuration to train, and the reasons for it.

    Attributes:
        config: configuration of the run to train.
        base: name of the configuration it was made from.
        edges_from: source of the edges, e.g. "algorithm 1", or "given stages".
        budget: mean forward FLOPs of a row that were requested.
        flops: mean forward FLOPs of a row in the planned network; `flops_encoder` is the encoder's part.
        probe_widths: decoder widths of the two probes, narrow and wide.
        probe_steps: training steps of each probe.
        held_out_rows: rows per stage on which the probes were compared.
        stages: lowest noise first.
        sentences: the reasons as text.
    """

    config: RunConfig
    base: str
    edges_from: str
    budget: float
    flops: float
    flops_encoder: int
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
        write_json(explained_file(out), self.explained())
        write_json(out, self.config)


def explained_file(out: Path) -> Path:
    """Return the path of a plan's explanation: plan.explained.json beside plan.json."""
    return out.with_suffix(".explained.json")


def plan(
    config: RunConfig,
    *,
    result: StageResult | None = None,
    stages: int = 3,
    budget: float | None = None,
    probe_steps: int = 300,
    out: Path | str | None = None,
    device: str | None = None,
    bar: Bars | None = None,
) -> Planned:
    """Propose edges and decoder widths for a data set and a budget.

    Args:
        config: the base; its data, encoder, depth, noise and training are kept.
        result: the result whose edges are used; None finds them (Algorithm 1 for three stages, 2 for other numbers).
        stages: number of stages to find.
        budget: mean forward FLOPs of a row (2 per multiply-add, encoder included); None: that of the base's network.
        probe_steps: training steps of each of the two probes.
        out: where to write the configuration as JSON, with the explanation beside it.
        device: default CUDA when there is one.
        bar: makes a progress display, called with (done, total), from a title.

    Raises:
        UserError: if something does not fit, before any probe is trained; or if both probes have the same losses.
    """
    bar = bar or _no_bar
    _check_arguments(config, budget, probe_steps)
    resolved, base = resolve_device(device), config.name
    data = open_configured(dataclasses.replace(config.data, fingerprint="", shape=()))
    config, codec = with_codec(with_paths(prepare(config, data)), resolved)
    parts = check(config, data)
    if not len(parts[1]):
        raise UserError("data.held_out=0: a plan compares losses on held-out images; give a share such as 0.1")
    size = (config.input_shape[1], config.input_shape[2])
    if budget is None:
        budget = mean_flops(config.network, _shares(config), size)
    edges_from = "given stages"
    if result is None:
        settings = StageSettings(algorithm=1 if stages == 3 else 2, stages=stages)
        edges_from = f"algorithm {settings.algorithm}"
        codec_config = config.codec if codec is not None else None
        with bar("finding stages") as progress:
            result = find(
                parts[0],
                settings,
                schedule=config.diffusion.schedule,
                codec=codec_config,
                device=device,
                progress=progress,
            )
    config = _staged(config, result)
    check(config, data)
    limits = Budget.of(budget, config.network, _shares(config), size)
    widths = probe_widths(config.network)
    with bar("encoding") as progress:
        prepared = PreparedRun.of(config, codec, parts, resolved, progress)
    with bar("probing") as progress:
        narrow, wide = _probed(prepared, widths, probe_steps, resolved, progress)
    found = _planned_stages(prepared, limits, widths, narrow, wide, resolved)
    network = dataclasses.replace(config.network, decoder_widths=tuple(stage.width for stage in found))
    flops = mean_flops(network, _shares(config), size)
    planned = Planned(
        config=dataclasses.replace(prepared.config, network=network),
        base=base,
        edges_from=edges_from,
        budget=budget,
        flops=flops,
        flops_encoder=limits.encoder,
        probe_widths=widths,
        probe_steps=probe_steps,
        held_out_rows=len(narrow[0]),
        stages=tuple(found),
        sentences=tuple(reasons(found, budget, flops)),
    )
    if out is not None:
        planned.save(Path(out))
    return planned


def _no_bar(title: str) -> AbstractContextManager[Progress]:
    def nothing(done: int, total: int) -> None:
        """Show nothing."""

    return nullcontext(nothing)


def _check_arguments(config: RunConfig, budget: float | None, probe_steps: int) -> None:
    if budget is not None and not 0 < budget < math.inf:
        raise UserError(f"budget={budget / 1e6:g} MFLOPs must be positive and finite")
    if probe_steps < 1:
        raise UserError(f"probe-steps={probe_steps} must be positive")
    if not config.data.source:
        raise UserError("data.source is empty: name the images that the plan is for")
    if config.training.branch_at:
        raise UserError(
            f"training.branch_at={config.training.branch_at} needs decoders that are alike, which a plan's are not; set it to 0"
        )


def _shares(config: RunConfig) -> tuple[float, ...]:
    return stage_shares(config.training, config.stages, config.diffusion.prior)


def _staged(config: RunConfig, result: StageResult) -> RunConfig:
    """Return a configuration with the stages found, one decoder per stage, and shares of rows as numbers.

    Raises:
        UserError: if they do not fit it, or a stage gets no rows.
    """
    stages, training = result.stages(), config.training
    shares = training.shares
    if not isinstance(shares, tuple) or len(shares) != len(stages):
        shares = halfway_shares(prior_masses(stages, config.diffusion.prior))
    if not all(shares):
        raise UserError(f"training.shares={list(shares)}: a stage without rows cannot be planned; give it some")
    widest = (max(config.network.decoder_widths),) * len(stages)
    network = dataclasses.replace(config.network, decoder_widths=widest)
    config = dataclasses.replace(
        config, network=network, stages=stages, training=dataclasses.replace(training, shares=shares)
    )
    return with_stages(config, result)


class _Steps(Callback[Trainer]):
    """Reports the steps of two probes as one task."""

    def __init__(self, before: int, total: int, progress: Progress) -> None:
        self.before, self.total, self.progress = before, total, progress

    def stepped(self, trainer: Trainer) -> None:
        """Report a step."""
        self.progress(self.before + trainer.step, self.total)


def _probed(
    prepared: PreparedRun, widths: Sequence[int], steps: int, device: torch.device, progress: Progress
) -> list[list[Tensor]]:
    """Train one probe per width, all its decoders of that width; return each probe's held-out row losses per stage.

    Rows, noise and held-out rows are the same for all probes: they are functions of seed, step, stage and row.
    """
    losses = []
    for number, width in enumerate(widths):
        config = _probe_config(prepared.config, width, steps)
        callback = _Steps(number * steps, len(widths) * steps, progress)
        with tempfile.TemporaryDirectory(prefix="msdiff-plan-") as folder:
            run = Run.create(Path(folder) / f"probe-{width}", config)
            trainer = Trainer(run, *prepared.parts, config=config, device=device, callbacks=[callback])
            trainer.fit()
        stages = range(len(config.stages))
        batches = (_held_out(config, prepared.parts[1], k, device) for k in stages)
        losses.append([held_out_row_losses(trainer.ema.module, batch, config.training.batch) for batch in batches])
    return losses


def _probe_config(config: RunConfig, width: int, steps: int) -> RunConfig:
    """Return the configuration of a probe: short, from scratch, with a warm-up that fits its length."""
    return dataclasses.replace(
        config,
        name=f"probe-{width}",
        network=dataclasses.replace(config.network, decoder_widths=(width,) * len(config.stages)),
        optimizer=dataclasses.replace(config.optimizer, warmup_steps=min(config.optimizer.warmup_steps, steps // 4)),
        training=dataclasses.replace(
            config.training,
            steps=steps,
            init_from="",
            # without a ramp, an EMA over hundreds of thousands of images would still hold the initial weights
            ema_rampup=config.training.ema_rampup or 0.05,
            log_every=steps,
            held_out_every=0,
            checkpoint_every=steps,
            keep_every=0,
            sample_every=0,
        ),
        evaluation=EvaluationConfig(),
    )


def _held_out(config: RunConfig, data: TrainingData, stage: int, device: torch.device) -> Batch:
    """Return the held-out rows of one stage."""
    training = dataclasses.replace(config.training, held_out_rows=max(ROWS, config.training.held_out_rows))
    return held_out_batch(dataclasses.replace(config, training=training), data, stage, device)


@torch.no_grad()
def held_out_row_losses(denoiser: MultiStageDenoiser, batch: Batch, at_once: int) -> Tensor:
    """Return the loss of every row of a one-stage batch, float64 (B,) on the CPU; see training.losses.

    Args:
        denoiser: on the batch's device.
        batch: rows of one stage.
        at_once: rows per pass, to bound memory.
    """
    losses = []
    for start in range(0, len(batch.y), at_once):
        rows = range(start, min(start + at_once, len(batch.y)))
        losses.append(row_losses(denoiser, batch.part(rows)))
    return torch.cat(losses).double().cpu()


def optimal_row_losses(config: RunConfig, optimal: OptimalDenoiser, batch: Batch) -> Tensor:
    """Return the optimal denoiser's loss of every row: its squared error times 1/c_out², float64 (B,)."""
    errors = (optimal(batch.noisy, batch.sigma) - batch.y).double().square().flatten(1).mean(1)
    out = make_preconditioning(config.diffusion).coefficients(batch.sigma).out
    return (errors / out.square()).cpu()


def _optimal_losses(prepared: PreparedRun, device: torch.device) -> list[float | None]:
    """Return the optimal denoiser's mean loss on each stage's held-out rows; None if there are too many images."""
    config, (training, held_out) = prepared.config, prepared.parts
    stages = range(len(config.stages))
    if 4 * len(training) * math.prod(training.shape) > MEMORY:
        return [None for _ in stages]
    rows = training.tensor()
    optimal = OptimalDenoiser((rows if rows.is_floating_point() else to_float(rows)).to(device))
    return [float(optimal_row_losses(config, optimal, _held_out(config, held_out, k, device)).mean()) for k in stages]


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
    optimal = _optimal_losses(prepared, device)
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
                "share": limits.shares[k],
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
        PlannedStage(**stage, flops_ideal=flops, width=option.width, flops=option.flops)
        for stage, flops, option in zip(known, ideal, chosen, strict=True)
    ]
