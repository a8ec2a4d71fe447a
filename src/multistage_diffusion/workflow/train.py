"""Training a run from its start, and the part of a training that starting and resuming share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..config.run import require_config
from ..config.serialization import override
from ..distributed import RankLost, World
from ..errors import UserError, explained
from ..files import NotWrittenError, write_json
from ..latent.latents import LatentData
from ..performance.devices import joined
from ..performance.execution import check_execution, settled
from ..progress import Progress
from ..samplers.class_labels import warn_of_empty
from ..stage_finding import StageResult
from ..training.callbacks import Callback
from ..training.checkpoint import checkpoint_step, list_checkpoints
from ..training.run import Run
from ..training.sample_grid import SampleGrid
from ..training.strategies import make_strategy
from ..training.tracking import Tracking
from ..training.trainer import Trainer
from ..version import __version__
from .checks import (
    latent_std,
    require_same_images,
    sample_std,
    warn_of_borrowed,
    warn_of_branching,
    warn_of_density,
    warn_of_few,
    warn_of_network,
    warn_of_sigma_data,
    warn_of_starved,
)
from .differences import CHANGEABLE, PLACES, differences, dotted
from .evaluation_callback import EvaluationCallback, FidReference
from .interrupts import stopped_by_signals
from .resolve import PreparedRun, ResolvedRun, open_new, require_channels, resolve_run
from .stages import save_stages

Prepared = tuple[PreparedRun, list[Callback[Trainer]]]  # input of the trainer, and evaluation callbacks


class TrainingStopped(KeyboardInterrupt):
    """A training that Ctrl-C or a signal stopped; its last step, if there is one, is saved.

    Attributes:
        what: the run's folder and the step, without the command that goes on.
    """

    def __init__(self, path: Path, step: int) -> None:
        self.what = f"{path}: stopped " + (f"at step {step} with a checkpoint" if step else "before its first step")
        super().__init__(f"{self.what}; go on with msdiff train --resume {path}")


def train(
    config: RunConfig,
    out: Path | str,
    changes: Mapping[str, Any] | None = None,
    *,
    result: StageResult | None = None,
    borrow: bool = False,
    replace: bool = False,
    device: str | None = None,
    strategy: str = "time",
    callbacks: Sequence[Callback[Trainer]] = (),
    trackers: Sequence[str] = (),
    progress: Progress | None = None,
) -> Run:
    """Start a run and train it to its end.

    Each of several processes (see distributed.join) calls it. They resume a run of the same configuration that already
    exists at `out`, so a launcher may restart the processes.

    Args:
        config: usually a preset.
        out: the run's new folder.
        changes: dotted keys of the configuration to change, see `override`.
        result: gives the stages; None keeps those of the configuration.
        borrow: accept stages that were found on other data.
        replace: move an existing run aside.
        device: default CUDA when there is one.
        strategy: what each process holds: "time": the whole network; "memory": only the decoders of its own stages;
            "fsdp": a slice of every parameter.
        callbacks: progress display, profile, ...
        trackers: names of trackers, such as "tensorboard".
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        UserError: if something does not fit; nothing has been written then.
        RankLost: if another process is lost.
    """
    require_config(config)
    path, (world, place) = Path(out), joined(device, "train")

    def open_run(config: RunConfig) -> Run:
        with world.synchronize_errors():
            if world.is_main_process and not _begun(world, path, config, replace=replace):
                _create(path, config, result, replace=replace)
        return Run.open(path)

    with world.report_failures():
        if world.size == 1:  # several processes may resume a run there
            Run.require_room(path, replace=replace)
        given = _given(config, path, changes or {}, result)
        return launch(
            lambda: _resolved(given, changes or {}, result, place, world.size, borrow=borrow),
            open_run,
            world=world,
            device=place,
            strategy=strategy,
            callbacks=callbacks,
            trackers=trackers,
            progress=progress,
        )


def _given(config: RunConfig, out: Path, changes: Mapping[str, Any], result: StageResult | None) -> RunConfig:
    """Return the configuration with all that the user gives: stages, changes, and the name of the run's folder."""
    if "name" in changes:
        raise UserError(f"name={changes['name']!r}: a run has the name of its folder; leave it out")
    stages = {} if result is None else {"stages": result.stages()}
    given = override(config, {**stages, **changes, "name": out.name})
    if not given.data.source:
        raise UserError(f"data.source is empty: preset {config.name!r} names no data; give --data")
    return given


def _resolved(
    config: RunConfig,
    changes: Mapping[str, Any],
    result: StageResult | None,
    device: torch.device,
    processes: int,
    *,
    borrow: bool,
) -> ResolvedRun:
    """Resolve a new run, and warn of settings that do not suit its data."""
    data = open_new(config.data)
    resolved = resolve_run(config, data, result, device, processes=processes)
    require_channels(changes, resolved.config.network.channels)
    training = resolved.images[0]
    if result is None:
        warn_of_borrowed(resolved.config)
    elif not borrow:
        require_same_images(result, data, training)
    warn_of_density(resolved.config)
    warn_of_network(resolved.config.network)
    if resolved.codec is None:
        warn_of_sigma_data(resolved.config, "images", sample_std(training))
    warn_of_few(*resolved.images)
    warn_of_starved(resolved.config)
    warn_of_branching(resolved.config.training)
    return resolved


def _begun(world: World, path: Path, config: RunConfig, *, replace: bool) -> bool:
    """Return whether the processes resume a run of this configuration (keys in CHANGEABLE may differ)."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if not (restarted or (world.size > 1 and not replace)) or not Run(path).config_file.exists():
        return False
    return all(key in CHANGEABLE for key in differences(Run(path).config(), config))


def _create(path: Path, config: RunConfig, result: StageResult | None, *, replace: bool) -> None:
    fill = (lambda run: save_stages(result, run.path / "stages.json")) if result is not None else None
    Run.create(path, config, replace=replace, fill=fill)


def launch(
    resolve: Callable[[], ResolvedRun],
    open_run: Callable[[RunConfig], Run],
    *,
    world: World,
    device: torch.device,
    strategy: str,
    callbacks: Sequence[Callback[Trainer]],
    trackers: Sequence[str],
    progress: Progress | None,
) -> Run:
    """Prepare a run on all processes, compare their configurations, and train it to its end.

    The main process opens and encodes the images first; the others find the index and the latents in the cache.

    Args:
        resolve: resolves the run; nothing is written to the run's folder.
        open_run: returns the run's folder, given the complete configuration; called when all processes agree.
        world, device, strategy, callbacks, trackers, progress: see `train`.
    """

    def prepare() -> Prepared:
        resolved = resolve()
        known = resolved.config.data
        warn_of_empty(known.class_counts, known.class_names)
        reference = FidReference.of(resolved.config, resolved.data, resolved.images[0], device)
        prepared = resolved.encoded(device, progress)
        latents = prepared.parts[0]
        if isinstance(latents, LatentData):  # known only now; those of pixels are checked before
            warn_of_sigma_data(prepared.config, "latents", latent_std(latents))
        return prepared, _evaluation_callbacks(reference, prepared, device)

    tracking = Tracking.of(trackers)
    prepared, evaluations = world.main_first(prepare)
    check_execution(settled(prepared.config.execution), device, world.size)
    make_strategy(strategy, prepared.config, prepared.config.input_shape, world)  # refuses before anything is written
    world.require_equal(_facts(prepared.config, device, strategy))
    return _fit(open_run(prepared.config), prepared, device, [*evaluations, *callbacks], tracking, world, strategy)


def _evaluation_callbacks(
    reference: FidReference | None, prepared: PreparedRun, device: torch.device
) -> list[Callback[Trainer]]:
    """Return the evaluation callbacks, if any; they run before the other callbacks, which print their results."""
    return [] if reference is None else [EvaluationCallback(prepared.config, reference, prepared.decode, device)]


def _facts(config: RunConfig, device: torch.device, strategy: str) -> dict[str, Any]:
    """Return the settings that must be equal on all processes."""
    ours = {"release": __version__, "torch": torch.__version__, "device": device.type, "strategy": strategy}
    return {**ours, **{key: value for key, value in dotted(config).items() if key not in PLACES}}


def _fit(
    run: Run,
    prepared: PreparedRun,
    device: torch.device,
    callbacks: Sequence[Callback[Trainer]],
    tracking: Tracking,
    world: World,
    strategy: str,
) -> Run:
    config = prepared.config
    grids = SampleGrid(config.input_shape, prepared.decode, tracking.images)
    trainer = Trainer(
        run,
        *prepared.parts,
        config=config,
        device=device,
        callbacks=[*callbacks, tracking, grids],
        world=world,
        strategy=strategy,
    )
    with world.synchronize_errors():
        if world.is_main_process and config != run.config():
            with run.locked():
                write_json(run.config_file, config)
    try:
        with stopped_by_signals(trainer.interrupt):
            trainer.fit()
    except RankLost:
        raise
    except OSError as error:
        if explained(error) is None:
            raise
        raise NotWrittenError(
            f"{run.path}: cannot be written at step {trainer.step} ({error.strerror or error}); {_kept(run)}; mend that "
            f"(free some space?) and go on with msdiff train --resume {run.path}",
            error,
        ) from error
    if trainer.stopped:
        raise world.known_to_all(TrainingStopped(run.path, trainer.step))
    return run


def _kept(run: Run) -> str:
    found = list_checkpoints(run.checkpoints)
    return f"the checkpoint of step {checkpoint_step(found[-1])} is intact" if found else "there is no checkpoint yet"
