"""What of a trainer a checkpoint holds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import UserError
from . import checkpoint as ckpt
from .sums import RunningSums

if TYPE_CHECKING:
    from .trainer import Trainer


def snapshot(trainer: Trainer, *, score: float | None, quality: float | None) -> ckpt.Checkpoint:
    """Return a trainer's state, gathered on the process that writes: checkpoints know neither strategy nor processes.

    Args:
        trainer: on every process.
        score: objective on held-out rows, if known.
        quality: Fréchet distance of the step's samples, if known.
    """
    state = {
        "step": trainer.step,
        "images": trainer.images,
        "score": score,
        "quality": quality,
        "sums": dataclasses.asdict(trainer.sums),
        "scaler": trainer.scaler.state_dict(),
        "config": trainer.config,
    }
    collect = trainer.team.collect
    return ckpt.Checkpoint(
        model=collect(trainer.denoiser.state_dict()),
        ema=collect(trainer.ema.module.state_dict()),
        optimizer=collect(ckpt.optimizer_tensors(trainer.optimizer, trainer.denoiser)),
        state=state,
    )


def restore(trainer: Trainer, path: Path) -> None:
    """Take a checkpoint's state into a trainer.

    Raises:
        UserError: if another release wrote it.
    """
    state = ckpt.read_state(path)
    trainer.denoiser.load_state_dict(ckpt.load_tensors(path, "model", trainer.denoiser.state_dict()))
    trainer.ema.module.load_state_dict(ckpt.load_tensors(path, "ema", trainer.ema.module.state_dict()))
    fields = ("step", "exp_avg", "exp_avg_sq")
    moments = [f"{name}.{field}" for name, _ in trainer.denoiser.named_parameters() for field in fields]
    ckpt.restore_optimizer(trainer.optimizer, trainer.denoiser, ckpt.load_tensors(path, "optimizer", moments))
    if state["scaler"]:
        trainer.scaler.load_state_dict(state["scaler"])
    try:
        trainer.sums = RunningSums(**state["sums"])
    except TypeError:
        raise UserError(f"{path}: was written by another release, which alone can resume it") from None
    trainer.step = state["step"]
