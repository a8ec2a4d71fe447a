"""Conversion between a trainer and a checkpoint."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..config import RunConfig
from ..denoisers import MultiStageDenoiser, build_denoiser
from ..distributed import World
from ..errors import UserError
from . import checkpoint as ckpt
from .ema import EMA, PowerEMA
from .metrics import MetricAccumulator, TrainingLog
from .optimizer import Optimization
from .strategies import Strategy

if TYPE_CHECKING:
    from .run import Run


class Checkpointed(Protocol):
    """What a checkpoint holds of a trainer."""

    run: Run
    world: World
    config: RunConfig
    denoiser: MultiStageDenoiser
    ema: EMA[MultiStageDenoiser]
    profiles: list[PowerEMA[MultiStageDenoiser]]
    strategy: Strategy
    optimization: Optimization
    log: TrainingLog
    step: int

    @property
    def images(self) -> int:
        """Number of training images seen so far."""


def latest_checkpoint(folder: Path, world: World) -> Path | None:
    """Return the checkpoint from which all processes resume: the latest on rank 0; None if there is none.

    Args:
        folder: of the checkpoints.
        world: the processes; all of them call it.

    Raises:
        UserError: if a process cannot see it.
    """
    found = ckpt.list_checkpoints(folder)
    name = world.broadcast_object(found[-1].name if found else None)
    with world.synchronize_errors():
        if name is not None and name not in [path.name for path in found]:
            raise UserError(
                f"{folder}: {name} is not there, which rank 0 goes on from; all processes need the run's folder on a file "
                "system that they share"
            )
    return None if name is None else folder / name


def profile_tensors(trainer: Checkpointed) -> dict[str, dict[str, Tensor]]:
    """Return the averages of training.ema_profiles by file name, gathered on the main process; all processes call it."""
    collect = trainer.strategy.gather_state
    return {ckpt.profile_file(a.sigma_rel): collect(a.module.state_dict()) for a in trainer.profiles}


def save_profiles(trainer: Checkpointed) -> None:
    """Write a snapshot of the averages of training.ema_profiles; all processes call it."""
    profiles = profile_tensors(trainer)
    with trainer.world.synchronize_errors():
        if trainer.world.is_main_process:
            ckpt.save_snapshot(trainer.run.snapshots, trainer.step, profiles)


def snapshot(trainer: Checkpointed, *, score: float | None, quality: float | None) -> ckpt.Checkpoint:
    """Return a trainer's state, gathered on the main process; all processes call it.

    A checkpoint does not depend on the strategy or the number of processes.

    Args:
        trainer: trainer of this process.
        score: objective on held-out rows, if known.
        quality: Fréchet distance of the step's samples, if known.
    """
    state = {
        "step": trainer.step,
        "images": trainer.images,
        "score": score,
        "quality": quality,
        "sums": dataclasses.asdict(trainer.log.sums),
        "scaler": trainer.optimization.scaler.state_dict(),
        "config": trainer.config,
    }
    collect, beside = trainer.strategy.gather_state, trainer.optimization.beside
    moments = ckpt.optimizer_tensors(trainer.optimization.optimizer, trainer.denoiser)
    return ckpt.Checkpoint(
        model=collect(trainer.denoiser.state_dict()),
        ema=collect(trainer.ema.module.state_dict()),
        optimizer=collect({**moments, **{k: v for module in beside for k, v in module.tensors().items()}}),
        state=state,
        profiles=profile_tensors(trainer),
    )


def restore(trainer: Checkpointed, path: Path) -> None:
    """Load a checkpoint into a trainer.

    Raises:
        UserError: if a file is damaged (the message names it) or another release wrote the checkpoint.
    """
    state, config = ckpt.read_state(path), ckpt.trained_config(path)
    if state["step"] > config.training.steps:
        raise UserError(
            f"{path / 'state.json'}: step={state['step']} is above its own config.training.steps={config.training.steps}; "
            "was it edited?"
        )
    with torch.device("meta"):  # this process may hold only a part of the network
        whole = build_denoiser(config).state_dict()
    local, beside = trainer.strategy.local, trainer.optimization.beside
    stored = {*whole, *(name for module in beside for name in module.names)}
    ckpt.restore_module(trainer.denoiser, path, "model", whole, local)
    ckpt.restore_module(trainer.ema.module, path, "ema", whole, local)
    for average in trainer.profiles if state["step"] else ():  # the first step replaces them
        ckpt.restore_module(average.module, path, ckpt.profile_file(average.sigma_rel), whole, local)
    ckpt.restore_moments(trainer.optimization.optimizer, trainer.denoiser, path, stored, local)
    for module in beside:
        module.restore(path, stored)
    if "scaler" not in state:
        raise UserError(f"{path / 'state.json'}: scaler is missing; was it edited?")
    if state["scaler"]:
        trainer.optimization.scaler.load_state_dict(state["scaler"])
    trainer.log.sums = _sums(state.get("sums"), len(config.stages), path)
    trainer.step = state["step"]


def _sums(data: Any, stages: int, path: Path) -> MetricAccumulator:
    known = {field.name for field in dataclasses.fields(MetricAccumulator)}
    if not isinstance(data, dict) or data.keys() != known:
        raise UserError(f"{path}: was written by another release, which alone can resume it")
    lists, tables = (data["loss"], data["rows"]), (data["norm"], data["seen"])
    right = (
        data["stages"] == stages
        and all(isinstance(values, list) and len(values) == stages for values in lists)
        and all(isinstance(table, dict) for table in tables)
        and data["norm"].keys() == data["seen"].keys()
        and all(_is_finite(v) for values in (*lists, *(t.values() for t in tables)) for v in values)
        and all(type(v) is int and v >= 0 for v in (*data["rows"], *data["seen"].values()))
    )
    if not right:
        raise UserError(f"{path / 'state.json'}: sums are not finite numbers for {stages} stages; was it edited?")
    return MetricAccumulator(**data)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
