"""Folders that diffusers' save_pretrained writes: an unconditional pipeline, its parts and their files.

    FOLDER/model_index.json  class and components of the pipeline, by whose names they are found (see pipeline_index)
    FOLDER/unet/           config.json and weights of a UNet2DModel; in old files, in FOLDER itself
    FOLDER/unet_ema/       the averaged network, beside checkpoints of training scripts
    FOLDER/scheduler/      scheduler_config.json; in old files, in FOLDER itself
    FOLDER/vae/, vqvae/, movq/  the autoencoder of a pipeline on latents

Checkpoints of diffusers' train_unconditional.py (OUT/checkpoint-N) have no scheduler; that of OUT is taken.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from ..config.serialization import read_json
from ..errors import UserError
from ..reading import brief, require_file
from .parts import tensors
from .pipeline_index import CODECS, PipelineIndex, read_index, require_class
from .published import read_torch

CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
WEIGHTS, OLD_WEIGHTS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
SHARDS = f"{WEIGHTS}.index.json"  # names the files of weights that are divided
AVERAGED = "unet_ema"


@dataclass(frozen=True, kw_only=True)
class DiffusersFolder:
    """The parts of an unconditional pipeline.

    Attributes:
        network: config.json of its U-Net.
        model: weights of its U-Net.
        ema: averaged weights, if a folder of their own holds them; else those of the model, which diffusers' training
            scripts average before they write a pipeline.
        scheduler: scheduler_config.json.
        codec: the folder of its autoencoder; None if it is on pixels.
    """

    network: Mapping[str, Any]
    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    scheduler: Mapping[str, Any]
    codec: Path | None


def read_folder(folder: Path) -> DiffusersFolder:
    """Read the folder of a pipeline, of a checkpoint of a training script, or of a U-Net beside its scheduler.

    Raises:
        UserError: naming the file that is missing or damaged, or what in its model_index.json cannot be a run.
    """
    averaged, index = folder / AVERAGED, read_index(folder)
    name = "unet" if index is None else index.network.name
    unet = next((place for place in (folder / name, averaged) if place.is_dir()), folder)
    if not (unet / CONFIG).is_file():
        raise UserError(
            f"{folder}: no {CONFIG} of a U-Net in it or in its folder {name}; give the folder of a pipeline"
        )
    if index is not None:
        require_class(index, index.network)
    config, model = read_mapping(unet / CONFIG), read_weights(unet)
    ema = model
    if averaged.is_dir() and averaged != unet:
        _require_same_network(config, averaged)
        ema = read_weights(averaged)
    scheduler = _scheduler(folder) if index is None else scheduler_of(index)
    if scheduler is None:
        raise UserError(f"{folder / 'scheduler' / SCHEDULER}: is missing; put the scheduler of the pipeline there")
    codec = _codec(folder) if index is None else index.codec_folder
    return DiffusersFolder(network=config, model=model, ema=ema, scheduler=scheduler, codec=codec)


def scheduler_of(index: PipelineIndex) -> Mapping[str, Any] | None:
    """Return the scheduler_config.json of a pipeline, with the class that its index names; None if it names none.

    diffusers takes that class, too, whatever the file says; its DDIMPipeline makes a DDIMScheduler of any.

    Raises:
        UserError: if the file is missing or damaged.
    """
    part = index.scheduler
    if part is None:
        return None
    file = part.folder / SCHEDULER
    if not file.is_file():
        raise UserError(f"{file}: is missing, but {index.file.name} names {part.name} ({part.kind}); copy it there")
    config = read_mapping(file)
    said = config.get("_class_name", part.kind)
    if said != part.kind:
        warnings.warn(
            f"{file}: _class_name={brief(said)}, but {index.file.name} says {brief(part.kind)}, which is taken, as by diffusers",
            stacklevel=3,
        )
    return {**config, "_class_name": "DDIMScheduler" if index.pipeline == "DDIMPipeline" else part.kind}


def beside_transformer(
    folder: Path, inner: Path, index: PipelineIndex | None
) -> tuple[Mapping[str, Any] | None, Path | None]:
    """Return what is beside a transformer: scheduler_config.json and the folder of an autoencoder; None: there is none.

    Args:
        folder: of the pipeline, or of the transformer.
        inner: of the transformer.
        index: of the pipeline, if it has one.

    Raises:
        UserError: if a file is missing or damaged, or is of another class than the index says.
    """
    if index is not None:
        require_class(index, index.network)
        return scheduler_of(index), index.codec_folder
    places = [inner / SCHEDULER, inner.resolve().parent / "scheduler" / SCHEDULER]
    scheduler = next((read_mapping(place) for place in places if place.is_file()), None)
    return scheduler, folder / "vae" if (folder / "vae" / CONFIG).is_file() else None


def _require_same_network(config: Mapping[str, Any], averaged: Path) -> None:
    """Raise UserError if the config.json of averaged weights, if there is one, is of another network."""
    if not (averaged / CONFIG).is_file():
        return
    other = read_mapping(averaged / CONFIG)
    for name in sorted(name for name in {*config} & {*other} if not name.startswith("_")):
        if config[name] != other[name]:
            raise UserError(
                f"{averaged / CONFIG}: {name}={brief(other[name])} is not the model's {brief(config[name])}; give the folder of "
                "the network that is right"
            )


def _scheduler(folder: Path) -> Mapping[str, Any] | None:
    above = folder.resolve().parent
    places = [folder / "scheduler", folder, above / "scheduler"]
    if folder.name in ("unet", AVERAGED):
        places.append(above.parent / "scheduler")
    for place in places:
        if (place / SCHEDULER).is_file():
            return read_mapping(place / SCHEDULER)
    return None


def _codec(folder: Path) -> Path | None:
    return next((folder / name for name in CODECS if (folder / name).is_dir()), None)


def read_mapping(file: Path) -> Mapping[str, Any]:
    """Read a JSON file that holds a mapping.

    Raises:
        UserError: if it holds something else.
    """
    found = read_json(file)
    if not isinstance(found, dict):
        raise UserError(f"{file}: is no mapping")
    return found


def _shards(index: Path) -> list[Path]:
    """Return the files that an index of divided weights names.

    Raises:
        UserError: if the index is damaged, or names a file that is not beside it.
    """
    names = read_mapping(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index}: has no weight_map of file names")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if file.name not in names.values() or not file.is_file():
            raise UserError(f"{index}: names {brief(str(file.name))}, which is not beside it")
    return files


def _load(file: Path) -> dict[str, Tensor]:
    require_file(file)
    try:
        return load(file.read_bytes())
    except SafetensorError as error:
        raise UserError(f"{file}: is truncated or damaged ({error})") from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a part to the CPU: safetensors, or else torch's archive, without running code from it.

    Raises:
        UserError: if there are none, or they are damaged.
    """
    file, old, shards = folder / WEIGHTS, folder / OLD_WEIGHTS, folder / SHARDS
    if shards.is_file():  # diffusers reads them rather than a single file beside them
        return {name: value for shard in _shards(shards) for name, value in _load(shard).items()}
    if file.is_file():
        return _load(file)
    if not old.is_file():
        variants = sorted(path.name for path in folder.glob("*.*.safetensors") if path.name != SHARDS)
        hint = f"; rename the variant that is right ({variants[0]}, ...)" if variants else ""
        raise UserError(f"{folder}: holds none of {WEIGHTS}, {SHARDS}, {OLD_WEIGHTS}{hint}")
    try:
        found = read_torch(old)
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(old)) else f"{old}: {text}") from None
    return tensors(found, str(old))
