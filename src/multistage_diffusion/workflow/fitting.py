"""Training a run, from its start or from its latest checkpoint."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig
from ..contracts import Codec
from ..data import ImageData, open_configured, to_float
from ..data.sources import located as located_source
from ..distributed import RankLost, World
from ..latents import LatentData
from ..nets.cost import network_cost
from ..network_config import LDM_GROUPS, NetworkConfig
from ..samplers import make_plan
from ..serialization import from_dict, override, to_dict, write_json
from ..splitting import SplitResult
from ..training.batches import BatchSource, row_counts, stage_shares
from ..training.callbacks import SampleGrid
from ..training.checkpoint import checkpoint_step, list_checkpoints, read_state
from ..training.devices import joined, precision_name
from ..training.run import Run
from ..training.strategies import Strategy
from ..training.trainer import Callback, Trainer
from ..training.warm_start import warm_start
from .finding import save_split
from .interrupts import stopped_by_signals
from .latent import decoder, encode_parts, with_codec, with_split
from .progress import Progress
from .quality import Quality, Yardstick


def prepare(config: RunConfig, data: ImageData) -> RunConfig:
    """Return a configuration that knows its data: where they are, their shape and fingerprint."""
    network = config.network if config.codec.used else dataclasses.replace(config.network, channels=data.shape[0])
    return dataclasses.replace(
        config,
        data=dataclasses.replace(located(config.data), fingerprint=data.fingerprint, shape=data.shape),
        network=network,
    )


def _warn_of_blind(network: NetworkConfig) -> None:
    """Say so where a GroupNorm of one channel per group takes away what a block adds for noise and class."""
    if network.family == "ldm" and LDM_GROUPS in (w * m for w in network.decoder_widths for m in network.channel_mult):
        warnings.warn(
            f"network.family=ldm with {LDM_GROUPS} channels at a level: GroupNorm in {LDM_GROUPS} groups then erases what the "
            f"network is told of noise and class; use at least {2 * LDM_GROUPS}",
            stacklevel=3,
        )


def _warn_of_borrowed(config: RunConfig, images: ImageData) -> None:
    """Say so where stages or sigma_data were made for other images."""
    if config.codec.used:  # neither is known of latents before they are made
        return
    made_for = config.stages.origin.get("data", config.data.source)
    if len(config.stages) > 1 and made_for != config.data.source:
        warnings.warn(
            f"the stages are those of {made_for}; msdiff split finds these data's own (--stages)", stacklevel=3
        )
    std = float(to_float(images.images[:4096]).std())
    if config.diffusion.precondition == "edm" and not 0.5 < config.diffusion.sigma_data / max(std, 1e-9) < 2.0:
        warnings.warn(
            f"diffusion.sigma_data={config.diffusion.sigma_data:g}, but the images' standard deviation is {std:.2g}; "
            f"consider --set diffusion.sigma_data={std:.2g}",
            stacklevel=3,
        )


def located(data: DataConfig) -> DataConfig:
    """Return data with the path of its source made absolute: a run is used from other folders too."""
    return dataclasses.replace(data, source=located_source(data.source))


def check(config: RunConfig, data: ImageData) -> tuple[ImageData, ImageData]:
    """Return (training, held-out) images of a data set on which a configuration can be trained.

    Raises:
        ValueError: if anything would stop the training later: network, sampler, batch, labels, held-out share or the run
            to start from.
    """
    network_cost(config.network, *config.input_shape[1:])
    make_plan(config.sampling, config.diffusion.schedule)
    row_counts(config.training, stage_shares(config.training, config.stages, config.diffusion.prior))
    parts = data.split(config.data.held_out)
    BatchSource(config, parts[0], torch.device("cpu"))
    if config.training.init_from:
        warm_start(config.training.init_from, config)
    return parts


def train(
    config: RunConfig,
    out: Path | str,
    *,
    result: SplitResult | None = None,
    replace: bool = False,
    device: str | None = None,
    strategy: Strategy = "time",
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> Run:
    """Start a run and train it to its end.

    Among several processes (see distributed.join) each calls it. There a run of the same configuration that is at `out`
    already is gone on with, so that whatever starts the processes may start them again.

    Args:
        config: usually a preset, changed with `override`.
        out: the run's new folder.
        result: the split that gives the stages; None keeps those of the configuration.
        replace: move a run that is there already aside.
        device: default CUDA when there is one.
        strategy: what each of several processes holds: "time" everything, "memory" the decoders of its own stages.
        callbacks: progress, TensorBoard, ...
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        ValueError: if something does not fit; nothing has been written then.
        RankLost: if another process is lost.
    """
    world, resolved = joined(device)
    with world.announced():
        if config.codec.used and world.size > 1:  # one process encodes the images, the others find them in the cache
            with world.together():
                if world.chief:
                    _prepared(config, out, result, resolved, progress)
        with world.together():
            material, judges = _prepared(config, out, result, resolved, progress)
        world.require_equal(_facts(material.config, resolved, strategy))
        begun = False
        with world.together():
            if world.chief:
                again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
                begun = (again or (world.size > 1 and not replace)) and _is_run_of(Path(out), material.config)
                if not begun:
                    _create(Path(out), material.config, result, replace=replace)
        return _fit(Run.open(out), material, resolved, [*judges, *callbacks], world, strategy)


def _prepared(
    config: RunConfig, out: Path | str, result: SplitResult | None, device: torch.device, progress: Progress | None
) -> tuple[Material, list[Callback]]:
    """Return what a new run is trained on, and what evaluates it; nothing is written."""
    if not config.data.source:
        raise ValueError(f"data.source is empty: preset {config.name!r} has no data of its own; give --data")
    data = open_configured(dataclasses.replace(config.data, fingerprint="", shape=()))
    config = dataclasses.replace(prepare(config, data), name=Path(out).name)
    config, codec = with_codec(with_paths(config), device)
    if result is not None:
        config = with_split(config, result)
    parts = check(config, data)
    if result is not None and result.fingerprint not in ("", data.fingerprint, parts[0].fingerprint):
        warnings.warn("the split was made on other data than these; its edges may not suit them", stacklevel=3)
    _warn_of_blind(config.network)
    if result is None:
        _warn_of_borrowed(config, parts[0])
    # the arithmetic chosen here is stored: a run resumed on another device keeps it
    precision = precision_name(config.training.precision, device)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, precision=precision))
    yardstick = Yardstick.of(config, data, parts[0], device)
    material = Material.of(config, codec, parts, device, progress)
    return material, _judges(yardstick, material, device)


def _facts(config: RunConfig, device: torch.device, strategy: Strategy) -> dict[str, Any]:
    """Return what must be the same on all processes."""
    from .. import __version__

    ours = {"release": __version__, "torch": torch.__version__, "device": device.type, "strategy": strategy}
    flat = _flat(to_dict(config))
    return {**ours, **{k: flat[k] for k in flat if k not in PLACES and not k.startswith("stages.origin.")}}


def _is_run_of(path: Path, config: RunConfig) -> bool:
    """Tell whether there is a run of this configuration; how long it is and what is written when do not count."""
    if not Run(path).config_file.exists():
        return False
    return all(key in CHANGEABLE for key in differences(Run(path).config(), config))


def _create(path: Path, config: RunConfig, result: SplitResult | None, *, replace: bool) -> None:
    run = Run.create(path, config, replace=replace)
    if result is not None:
        save_split(result, run.path / "split.json")


def with_paths(config: RunConfig) -> RunConfig:
    """Return a configuration with absolute paths of the run it starts from and of the reference it is evaluated by."""
    training, evaluation = config.training, config.evaluation
    return dataclasses.replace(
        config,
        training=dataclasses.replace(training, init_from=_absolute(training.init_from)),
        evaluation=dataclasses.replace(evaluation, reference=_absolute(evaluation.reference)),
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


def _judges(yardstick: Yardstick | None, material: Material, device: torch.device) -> list[Callback]:
    """Return what evaluates a run while it trains, if anything: before the other callbacks, which tell of it."""
    return [] if yardstick is None else [Quality(material.config, yardstick, material.decode, device)]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a trainer is given: training and held-out images, or latents with the map that decodes them."""

    config: RunConfig
    parts: tuple[ImageData, ImageData] | tuple[LatentData, LatentData]
    decode: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        codec: Codec | None,
        parts: tuple[ImageData, ImageData],
        device: torch.device,
        progress: Progress | None,
    ) -> Material:
        """Encode the images of a run with a codec; a run on pixels takes them as they are."""
        if codec is None:
            return cls(config=config, parts=parts)
        config, latents = encode_parts(config, codec, parts, device, progress)
        assert config.codec.scale is not None
        return cls(config=config, parts=latents, decode=decoder(codec, config.codec.scale))


# What may differ between machines: where things are, and the last digits of what each has measured.
PLACES = ("data.source", "codec.source", "codec.scale", "training.init_from", "evaluation.reference")


# What may differ when a run is resumed: its length and what is written when, never what is computed.
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
)


# What an imported run learns when it is first resumed.
RECORDED = ("data.fingerprint", "codec.fingerprint", "codec.scale", "codec.shape", "training.precision")


def resume(
    path: Path | str,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    strategy: Strategy = "time",
    callbacks: Sequence[Callback] = (),
    progress: Progress | None = None,
) -> Run:
    """Go on with a run from its latest checkpoint: under any strategy, on any number of processes.

    Args:
        path: the run's folder.
        changes: dotted keys to change, of CHANGEABLE only: a longer training, data that have moved.
        device: default CUDA when there is one.
        strategy: see `train`.
        callbacks: progress, TensorBoard, ...
        progress: called with (done, total) while images are encoded into latents.

    Raises:
        ValueError: if there is no run, a change would make it another run, or the data are not those it was started on.
        RankLost: if another process is lost.
    """
    world, resolved = joined(device)
    with world.announced():
        with world.together():
            run = Run.open(Path(path))
            material, judges = _reopened(run, changes or {}, resolved, progress)
        world.require_equal(_facts(material.config, resolved, strategy))
        return _fit(run, material, resolved, [*judges, *callbacks], world, strategy)


def _reopened(
    run: Run, changes: Mapping[str, Any], device: torch.device, progress: Progress | None
) -> tuple[Material, list[Callback]]:
    """Return what a run is trained on further, and what evaluates it."""
    config = run.config()
    _refuse_edited(run, config)
    changed = override(config, changes)
    refused = [key for key in differences(config, changed) if key not in CHANGEABLE]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: differs from the run's own; resuming may change only {', '.join(CHANGEABLE)}; start a "
            "new run for anything else"
        )
    changed = dataclasses.replace(changed, data=located(changed.data))
    found = list_checkpoints(run.checkpoints)
    if found and changed.training.steps < checkpoint_step(found[-1]):
        raise ValueError(
            f"training.steps={changed.training.steps} is below step {checkpoint_step(found[-1])}, which {run.path} has "
            "reached; give more"
        )
    data = run.data(changed.data)
    changed = dataclasses.replace(  # an imported run knows neither yet
        changed,
        data=dataclasses.replace(changed.data, fingerprint=data.fingerprint),
        training=dataclasses.replace(changed.training, precision=precision_name(changed.training.precision, device)),
    )
    changed, codec = with_codec(changed, device)
    parts = check(changed, data)
    yardstick = Yardstick.of(changed, data, parts[0], device)
    material = Material.of(changed, codec, parts, device, progress)
    return material, _judges(yardstick, material, device)


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """Return the dotted keys in which two configurations differ; where stages come from makes none."""
    one, other = _flat(to_dict(a)), _flat(to_dict(b))
    keys = [key for key in one | other if one.get(key) != other.get(key)]
    return [key for key in keys if not key.startswith("stages.origin.")]


def _flat(data: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat


def _refuse_edited(run: Run, config: RunConfig) -> None:
    """Raise ValueError if config.json is no longer what the latest checkpoint was trained with."""
    found = list_checkpoints(run.checkpoints)
    if not found:
        return
    before = from_dict(RunConfig, read_state(found[-1])["config"])
    known = _flat(to_dict(before))
    edited = [
        key
        for key in differences(before, config)
        if key not in CHANGEABLE and not (key in RECORDED and known[key] in ("", "auto", None, []))
    ]
    if edited:
        raise ValueError(
            f"{run.config_file}: {', '.join(edited)} was edited since step {checkpoint_step(found[-1])}; put it back or "
            "start a new run"
        )


def _fit(
    run: Run,
    material: Material,
    device: torch.device,
    callbacks: Sequence[Callback],
    world: World,
    strategy: Strategy,
) -> Run:
    config = material.config
    grids = SampleGrid(config.input_shape, material.decode)
    trainer = Trainer(
        run,
        *material.parts,
        config=config,
        device=device,
        callbacks=[*callbacks, grids],
        world=world,
        strategy=strategy,
    )
    with world.together():
        if world.chief and config != run.config():
            with run.locked():
                write_json(run.config_file, config)
    try:
        with stopped_by_signals(trainer.stop):
            trainer.fit()
    except RankLost:
        raise
    except OSError as error:
        raise OSError(
            f"{run.path}: cannot be written at step {trainer.step} ({error.strerror or error}); {_kept(run)}; mend that "
            f"(free some space?) and go on with msdiff train --resume {run.path}"
        ) from error
    if trainer.stopped:
        stopped = KeyboardInterrupt(
            f"{run.path}: stopped at step {trainer.step} with a checkpoint; go on with msdiff train --resume {run.path}"
        )
        raise world.shared(stopped)
    return run


def _kept(run: Run) -> str:
    found = list_checkpoints(run.checkpoints)
    return f"the checkpoint of step {checkpoint_step(found[-1])} is intact" if found else "there is no checkpoint yet"
