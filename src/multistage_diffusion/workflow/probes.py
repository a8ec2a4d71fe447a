"""Probes of a plan: short trainings of two widths, and their losses on held-out rows beside the optimal denoiser's."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import EvaluationConfig, RunConfig
from ..config.serialization import override
from ..data import to_float
from ..denoisers import MultiStageDenoiser
from ..optimal import OptimalDenoiser
from ..preconditioning import make_preconditioning
from ..progress import Progress
from ..training.batches import Batch, TrainingData, held_out_batch
from ..training.callbacks import Callback
from ..training.losses import row_losses
from ..training.run import Run
from ..training.trainer import Trainer
from .resolve import PreparedRun

ROWS = 1024  # least held-out rows of a stage; fewer give large errors of the gains
MEMORY = 2 << 30  # most bytes of training images, as floats, for an optimal denoiser


class _Steps(Callback[Trainer]):
    """Reports the steps of two probes as one task."""

    def __init__(self, before: int, total: int, progress: Progress) -> None:
        self.before, self.total, self.progress = before, total, progress

    def stepped(self, trainer: Trainer) -> None:
        """Report a step."""
        self.progress(self.before + trainer.step, self.total)


def probed(
    prepared: PreparedRun, widths: Sequence[int], steps: int, device: torch.device, progress: Progress
) -> list[list[Tensor]]:
    """Train one probe per width, all its decoders of that width; return each probe's held-out row losses per stage.

    Rows, noise and held-out rows are the same for all probes: they are functions of seed, step, stage and row.
    """
    losses = []
    for number, width in enumerate(widths):
        config = probe_config(prepared.config, width, steps)
        callback = _Steps(number * steps, len(widths) * steps, progress)
        with tempfile.TemporaryDirectory(prefix="msdiff-plan-") as folder:
            run = Run.create(Path(folder) / f"probe-{width}", config)
            trainer = Trainer(run, *prepared.parts, config=config, device=device, callbacks=[callback])
            trainer.fit()
        stages = range(len(config.stages))
        batches = (_held_out(config, prepared.parts[1], k, device) for k in stages)
        losses.append([held_out_row_losses(trainer.ema.module, batch, config.training.batch) for batch in batches])
    return losses


def probe_config(config: RunConfig, width: int, steps: int) -> RunConfig:
    """Return the configuration of a probe: short, from scratch, with a warm-up that fits its length."""
    return override(
        config,
        {
            "name": f"probe-{width}",
            "network.decoder_widths": (width,) * len(config.stages),
            "optimizer.warmup_steps": min(config.optimizer.warmup_steps, steps // 4),
            "training.steps": steps,
            "training.init_from": "",
            "training.freeze": "nothing",
            # without a ramp, an EMA over hundreds of thousands of images would still hold the initial weights
            "training.ema_rampup": config.training.ema_rampup or 0.05,
            "training.ema_profiles": (),
            "training.log_every": steps,
            "training.held_out_every": 0,
            "training.checkpoint_every": steps,
            "training.keep_every": 0,
            "training.sample_every": 0,
            "evaluation": EvaluationConfig(),
        },
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


def optimal_losses(prepared: PreparedRun, device: torch.device) -> list[float | None]:
    """Return the optimal denoiser's mean loss on each stage's held-out rows; None if there are too many images."""
    config, (training, held_out) = prepared.config, prepared.parts
    stages = range(len(config.stages))
    if 4 * len(training) * math.prod(training.shape) > MEMORY:
        return [None for _ in stages]
    rows = training.tensor()
    optimal = OptimalDenoiser((rows if rows.is_floating_point() else to_float(rows)).to(device))
    return [float(optimal_row_losses(config, optimal, _held_out(config, held_out, k, device)).mean()) for k in stages]
