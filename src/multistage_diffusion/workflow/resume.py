"""Resuming a run from its latest checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..config.serialization import override
from ..errors import UserError
from ..performance.devices import joined
from ..progress import Progress
from ..trackers.registry import tracked
from ..training.callbacks import Callback
from ..training.checkpoint import checkpoint_step, list_checkpoints, trained_config
from ..training.run import Run
from ..training.trainer import Trainer
from .differences import CHANGEABLE, differences, dotted
from .resolve import ResolvedRun, resolve_run
from .train import launch

_LOG = logging.getLogger(__name__)

# Keys that an imported run records when it is first resumed.
RECORDED = (
    "data.class_counts",
    "data.class_names",
    "data.fingerprint",
    "codec.fingerprint",
    "codec.scale",
    "codec.shape",
    "training.precision",
)


def resume(
    path: Path | str,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    strategy: str = "time",
    callbacks: Sequence[Callback[Trainer]] = (),
    trackers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Run:
    """Resume a run from its latest checkpoint, with any strategy and any number of processes.

    Args:
        path: the run's folder.
        changes: dotted keys to change, only those in CHANGEABLE: a longer training, data that have moved.
        device: default CUDA when there is one.
        strategy: see `train`.
        callbacks: progress display, profile, ...
        trackers: names of trackers, such as "tensorboard"; None: those of the training that is resumed.
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        UserError: if there is no run, a key may not change, or the data are not those the run was started on.
        RankLost: if another process is lost.
    """
    world, place = joined(device, "train --resume")
    with world.report_failures():
        with world.synchronize_errors():
            run = Run.open(Path(path))
            trackers = tracked(run.path) if trackers is None else trackers
        return launch(
            lambda: _resolved(run, changes or {}, place, world.size),
            lambda _: run,
            world=world,
            device=place,
            strategy=strategy,
            callbacks=callbacks,
            trackers=trackers,
            progress=progress,
        )


def _resolved(run: Run, changes: Mapping[str, Any], device: torch.device, processes: int) -> ResolvedRun:
    """Resolve a run that is resumed, after checking that it may be resumed with these changes."""
    config = run.config()
    run.check_records()
    _refuse_edited(run, config)
    changed = override(config, changes)
    _refuse_changes(run, config, changed)
    resolved = resolve_run(changed, run.data(changed.data), None, device, processes=processes)
    before, now = dotted(config), dotted(changed)
    told = [f"{key}={now.get(key)} (was {before.get(key)})" for key in differences(config, changed)]
    if told:
        _LOG.info(f"{run.path}: resuming with {', '.join(told)}")
    return resolved


def _refuse_changes(run: Run, config: RunConfig, changed: RunConfig) -> None:
    """Raise UserError if a run cannot be resumed with a changed configuration, or has lost its checkpoint."""
    refused = [key for key in differences(config, changed) if key not in CHANGEABLE]
    if refused:
        raise UserError(
            f"{', '.join(refused)}: may not change when a run is resumed; start a new run, or change only "
            f"{', '.join(CHANGEABLE)}"
        )
    if changed.codec.used and not config.codec.used:
        raise UserError(f"codec.source: {run.path} is trained on pixels, not on latents; start a new run for latents")
    found = list_checkpoints(run.checkpoints)
    if not found and (run.imported_file.exists() or not config.data.fingerprint):
        raise UserError(f"{run.path}: was imported, but has no checkpoint; import it again (--replace)")
    if found and changed.training.steps < checkpoint_step(found[-1]):
        raise UserError(
            f"training.steps={changed.training.steps} is below step {checkpoint_step(found[-1])}, which {run.path} has "
            "reached; give more"
        )


def _refuse_edited(run: Run, config: RunConfig) -> None:
    """Raise UserError if config.json differs from the configuration that the latest checkpoint was trained with."""
    found = list_checkpoints(run.checkpoints)
    if not found:
        return
    before = trained_config(found[-1])
    known = dotted(before)
    edited = [
        key
        for key in differences(before, config)
        if (key not in CHANGEABLE and not (key in RECORDED and known[key] in ("", "auto", None, [])))
        or (key.startswith("codec.") and not before.codec.used)
    ]
    if edited:
        raise UserError(
            f"{run.config_file}: {', '.join(edited)} was edited since step {checkpoint_step(found[-1])}; put it back or "
            "start a new run"
        )
