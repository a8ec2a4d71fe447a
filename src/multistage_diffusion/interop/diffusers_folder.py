"""Folders that diffusers' save_pretrained writes: an unconditional pipeline, its parts and their files.

    FOLDER/unet/           config.json and weights of a UNet2DModel; in old files, in FOLDER itself
    FOLDER/unet_ema/       the averaged network, beside checkpoints of training scripts
    FOLDER/scheduler/      scheduler_config.json; in old files, in FOLDER itself
    FOLDER/vae/ or vqvae/  the autoencoder of a pipeline on latents

Checkpoints of diffusers' train_unconditional.py (OUT/checkpoint-N) have no scheduler; that of OUT is taken.
"""

from __future__ import annotations

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
from .published import read_torch

CONFIG, SCHEDULER = "config.json", "scheduler_config.json"
WEIGHTS, OLD_WEIGHTS = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"
SHARDS = f"{WEIGHTS}.index.json"  # names the files of weights that are divided
AVERAGED = "unet_ema"
CODECS = ("vae", "vqvae")


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
        UserError: naming the file that is missing or damaged.
    """
    averaged = folder / AVERAGED
    unet = next((place for place in (folder / "unet", averaged) if place.is_dir()), folder)
    if not (unet / CONFIG).is_file():
        raise UserError(f"{folder}: no {CONFIG} of a U-Net in it or in its folder unet; give the folder of a pipeline")
    config, model = read_mapping(unet / CONFIG), read_weights(unet)
    ema = model
    if averaged.is_dir() and averaged != unet:
        _require_same_network(config, averaged)
        ema = read_weights(averaged)
    return DiffusersFolder(network=config, model=model, ema=ema, scheduler=_scheduler(folder), codec=_codec(folder))


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


def _scheduler(folder: Path) -> Mapping[str, Any]:
    above = folder.resolve().parent
    places = [folder / "scheduler", folder, above / "scheduler"]
    if folder.name in ("unet", AVERAGED):
        places.append(above.parent / "scheduler")
    for place in places:
        if (place / SCHEDULER).is_file():
            return read_mapping(place / SCHEDULER)
    raise UserError(f"{folder / 'scheduler' / SCHEDULER}: is missing; put the scheduler of the pipeline there")


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
