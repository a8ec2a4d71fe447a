"""Training a run, from its start or from its latest checkpoint."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import RunConfig
from ..config.serialization import override, to_dict
from ..data import open_configured
from ..distributed import RankLost, World
from ..errors import UserError, explained
from ..files import NotWrittenError, write_json
from ..performance.devices import joined, precision_name
from ..performance.execution import check_execution, settled
from ..progress import Progress
from ..samplers.class_labels import with_class_counts
from ..stage_finding import StageResult
from ..training.callbacks import Callback
from ..training.checkpoint import checkpoint_step, list_checkpoints, trained_config
from ..training.run import Run
from ..training.sample_grid import SampleGrid
from ..training.strategies import make_strategy
from ..training.trainer import Trainer
from ..version import __version__
from .evaluation_callback import FidReference, Quality
from .interrupts import stopped_by_signals
from .latent import with_codec, with_stages
from .prepare import PreparedRun, check, located, prepare, warn_of_blind, warn_of_borrowed, with_paths
from .stages import save_stages

Prepared = tuple[PreparedRun, list[Callback[Trainer]]]  # input of the trainer, and evaluation callbacks


def train(
    config: RunConfig,
    out: Path | str,
    *,
    result: StageResult | None = None,
    replace: bool = False,
    device: str | None = None,
    strategy: str = "time",
    callbacks: Sequence[Callback[Trainer]] = (),
    progress: Progress | None = None,
) -> Run:
    """Start a run and train it to its end.

    Each of several processes (see distributed.join) calls it. They resume a run of the same configuration that already
    exists at `out`, so a launcher may restart the processes.

    Args:
        config: usually a preset, changed with `override`.
        out: the run's new folder.
        result: gives the stages; None keeps those of the configuration.
        replace: move an existing run aside.
        device: default CUDA when there is one.
        strategy: what each process holds: "time": the whole network; "memory": only the decoders of its own stages;
            "fsdp": a slice of every parameter.
        callbacks: progress, TensorBoard, ...
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        UserError: if something does not fit; nothing has been written then.
        RankLost: if another process is lost.
    """
    world, resolved = joined(device, "train")
    with world.report_failures():
        if world.size == 1:  # several processes may resume a run there
            Run.require_room(Path(out), replace=replace)
        prepared, judges = _in_turn(
            world, config.codec.used, lambda: _prepared(config, out, result, resolved, progress, world.size)
        )
        check_execution(settled(prepared.config.execution), resolved, world.size)
        make_strategy(strategy, prepared.config, prepared.config.input_shape, world)
        world.require_equal(_facts(prepared.config, resolved, strategy))
        begun = False
        with world.synchronize_errors():
            if world.is_main_process:
                again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
                begun = (again or (world.size > 1 and not replace)) and _is_run_of(Path(out), prepared.config)
                if not begun:
                    _create(Path(out), prepared.config, result, replace=replace)
        return _fit(Run.open(out), prepared, resolved, [*judges, *callbacks], world, strategy)


def _in_turn(world: World, encodes: bool, prepare: Callable[[], Prepared]) -> Prepared:
    """Prepare on all processes; if images are encoded, the main process is first, and the others read its cache."""
    found: Prepared | None = None
    for turn in ("first", "others"):
        with world.synchronize_errors():
            if (turn == "first") == (world.is_main_process or not encodes):
                found = prepare()
    assert found is not None
    return found


def _prepared(
    config: RunConfig,
    out: Path | str,
    result: StageResult | None,
    device: torch.device,
    progress: Progress | None,
    processes: int,
) -> Prepared:
    """Return a new run's trainer input and evaluation callbacks; nothing is written to the run's folder."""
    if not config.data.source:
        raise UserError(f"data.source is empty: preset {config.name!r} has no data of its own; give --data")
    data = open_configured(dataclasses.replace(config.data, fingerprint="", shape=()))
    config = dataclasses.replace(prepare(config, data), name=Path(out).name)
    config, codec = with_codec(with_paths(config), device)
    if result is not None:
        config = with_stages(config, result)
    parts = check(config, data, device, processes)
    config = with_class_counts(config, parts[0])
    if result is not None and result.fingerprint not in ("", data.fingerprint, parts[0].fingerprint):
        warnings.warn("the stages were found on other data than these; its edges may not suit them", stacklevel=3)
    warn_of_blind(config.network)
    if result is None:
        warn_of_borrowed(config, parts[0])
    # the precision chosen here is stored: a run resumed on another device keeps it
    precision = precision_name(config.training.precision, device)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))
    yardstick = FidReference.of(config, data, parts[0], device)
    prepared = PreparedRun.of(config, codec, parts, device, progress)
    return prepared, _judges(yardstick, prepared, device)


def _facts(config: RunConfig, device: torch.device, strategy: str) -> dict[str, Any]:
    """Return the settings that must be equal on all processes."""
    ours = {"release": __version__, "torch": torch.__version__, "device": device.type, "strategy": strategy}
    flat = _flat(to_dict(config))
    return {**ours, **{k: flat[k] for k in flat if k not in PLACES and not k.startswith("stages.origin.")}}


def _is_run_of(path: Path, config: RunConfig) -> bool:
    """Return whether there is a run of this configuration; keys in CHANGEABLE may differ."""
    if not Run(path).config_file.exists():
        return False
    return all(key in CHANGEABLE for key in differences(Run(path).config(), config))


def _create(path: Path, config: RunConfig, result: StageResult | None, *, replace: bool) -> None:
    fill = (lambda run: save_stages(result, run.path / "stages.json")) if result is not None else None
    Run.create(path, config, replace=replace, fill=fill)


def _judges(yardstick: FidReference | None, prepared: PreparedRun, device: torch.device) -> list[Callback[Trainer]]:
    """Return the evaluation callbacks, if any; they run before the other callbacks, which print their results."""
    return [] if yardstick is None else [Quality(prepared.config, yardstick, prepared.decode, device)]


# Keys that may differ between machines: paths, and the last digits of measured values.
PLACES = ("data.source", "codec.source", "codec.scale", "training.init_from", "evaluation.reference")


# Keys that may change when a run is resumed: its length, output intervals, how steps are computed; never the results.
CHANGEABLE = (
    "data.source",
    "codec.source",
    "training.steps",
    "training.log_every",
    "training.held_out_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
    "training.sample_every",
    "training.sample_count",
    "evaluation.every",
    "evaluation.patience",
    "execution.channels_last",
    "execution.compile",
    "execution.cuda_graphs",
    "execution.thread_parallel",
    "execution.recompute",
)


# Keys that an imported run records when it is first resumed.
RECORDED = (
    "data.class_counts",
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
    progress: Progress | None = None,
) -> Run:
    """Resume a run from its latest checkpoint, with any strategy and any number of processes.

    Args:
        path: the run's folder.
        changes: dotted keys to change, only those in CHANGEABLE: a longer training, data that have moved.
        device: default CUDA when there is one.
        strategy: see `train`.
        callbacks: progress, TensorBoard, ...
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        UserError: if there is no run, a key may not change, or the data are not those the run was started on.
        RankLost: if another process is lost.
    """
    world, resolved = joined(device, "train --resume")
    with world.report_failures():
        with world.synchronize_errors():
            run = Run.open(Path(path))
            encodes = run.config().codec.used
        prepared, judges = _in_turn(
            world, encodes, lambda: _reopened(run, changes or {}, resolved, progress, world.size)
        )
        check_execution(settled(prepared.config.execution), resolved, world.size)
        make_strategy(strategy, prepared.config, prepared.config.input_shape, world)
        world.require_equal(_facts(prepared.config, resolved, strategy))
        return _fit(run, prepared, resolved, [*judges, *callbacks], world, strategy)


def _reopened(
    run: Run, changes: Mapping[str, Any], device: torch.device, progress: Progress | None, processes: int
) -> Prepared:
    """Return a resumed run's trainer input and evaluation callbacks."""
    config = run.config()
    run.check_records()
    _refuse_edited(run, config)
    changed = override(config, changes)
    refused = [key for key in differences(config, changed) if key not in CHANGEABLE]
    if refused:
        raise UserError(
            f"{', '.join(refused)}: differs from the run's own; resuming may change only {', '.join(CHANGEABLE)}; start a "
            "new run for anything else"
        )
    if changed.codec.used and not config.codec.used:
        raise UserError(f"codec.source: {run.path} is trained on pixels, not on latents; start a new run for those")
    changed = dataclasses.replace(changed, data=located(changed.data))
    found = list_checkpoints(run.checkpoints)
    if not found and (run.imported_file.exists() or not config.data.fingerprint):
        raise UserError(f"{run.path}: was imported, but its checkpoint is gone; import it again (--replace)")
    if found and changed.training.steps < checkpoint_step(found[-1]):
        raise UserError(
            f"training.steps={changed.training.steps} is below step {checkpoint_step(found[-1])}, which {run.path} has "
            "reached; give more"
        )
    data = run.data(changed.data)
    changed = dataclasses.replace(  # an imported run has neither yet
        changed,
        data=dataclasses.replace(changed.data, fingerprint=data.fingerprint),
        training=dataclasses.replace(changed.training, precision=precision_name(changed.training.precision, device)),
    )
    changed, codec = with_codec(changed, device)
    parts = check(changed, data, device, processes)
    changed = with_class_counts(changed, parts[0])
    yardstick = FidReference.of(changed, data, parts[0], device)
    prepared = PreparedRun.of(changed, codec, parts, device, progress)
    return prepared, _judges(yardstick, prepared, device)


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Return the dotted keys in which two configurations differ, except the origin of the stages."""
    one, other = _flat(to_dict(a)), _flat(to_dict(b))
    keys = [key for key in one | other if one.get(key) != other.get(key)]
    return [key for key in keys if not key.startswith("stages.origin.")]


def _flat(data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat


def _refuse_edited(run: Run, config: RunConfig) -> None:
    """Raise UserError if config.json differs from the configuration that the latest checkpoint was trained with."""
    found = list_checkpoints(run.checkpoints)
    if not found:
        return
    before = trained_config(found[-1])
    known = _flat(to_dict(before))
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


def _fit(
    run: Run,
    prepared: PreparedRun,
    device: torch.device,
    callbacks: Sequence[Callback[Trainer]],
    world: World,
    strategy: str,
) -> Run:
    config = prepared.config
    grids = SampleGrid(config.input_shape, prepared.decode)
    trainer = Trainer(
        run,
        *prepared.parts,
        config=config,
        device=device,
        callbacks=[*callbacks, grids],
        world=world,
        strategy=strategy,
    )
    with world.synchronize_errors():
        if world.is_main_process and config != run.config():
            with run.locked():
                write_json(run.config_file, config)
    try:
        with stopped_by_signals(trainer.stop):
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
        stopped = KeyboardInterrupt(
            f"{run.path}: stopped at step {trainer.step} with a checkpoint; go on with msdiff train --resume {run.path}"
        )
        raise world.known_to_all(stopped)
    return run


def _kept(run: Run) -> str:
    found = list_checkpoints(run.checkpoints)
    return f"the checkpoint of step {checkpoint_step(found[-1])} is intact" if found else "there is no checkpoint yet"
