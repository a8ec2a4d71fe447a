"""How a run's configuration is resolved: every key that the user leaves open is set here, once.

`resolve_run` sets them from the images, the codec and the device, and checks the whole before anything is encoded or
written. `ResolvedRun.encoded` encodes the images of a run on latents; it sets the only key that needs the latents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig
from ..config.serialization import override
from ..contracts import Codec
from ..data import ImageData
from ..data.sources import located, open_configured
from ..errors import require
from ..latent.codecs import open_codec
from ..latent.latents import LatentData
from ..performance.devices import precision_name
from ..progress import Progress
from ..samplers.class_labels import class_counts, class_names
from ..stage_finding import StageResult
from .checks import check, require_same_input
from .latent import decoder, encode_parts, located_codec, with_declared_scale

_PATH = "absolute, because a run is used from other folders, too"

# The keys that this module sets, and to what. All others keep the value that the user gave.
RESOLVED = {
    "data.source": _PATH,
    "data.shape": "shape of the images",
    "data.fingerprint": "fingerprint of the images",
    "data.class_counts": "training images of each class, if the network is class-conditional",
    "data.class_names": "names of the classes, if the network is class-conditional and the data have names",
    "codec.source": _PATH,
    "codec.shape": "shape of the latents of these images",
    "codec.fingerprint": "fingerprint of the codec",
    "codec.scale": "scale of the latents on which the stages were found; else, if open, measured on the training latents; "
    "of 'config' the autoencoder's scaling_factor",
    "codec.shift": "shift_factor of the autoencoder, if codec.scale is 'config'",
    "network.channels": "channels of the images or latents",
    "training.init_from": _PATH,
    "training.precision": "choice of 'auto' on this device; a run that is resumed on another device keeps it",
    "evaluation.reference": _PATH,
}


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """The input of a trainer.

    Attributes:
        config: complete.
        parts: training and held-out images or latents.
        decode: maps latents to images; None for a run on pixels.
    """

    config: RunConfig
    parts: tuple[ImageData, ImageData] | tuple[LatentData, LatentData]
    decode: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRun:
    """A checked run before its images are encoded.

    Attributes:
        config: complete, but for codec.scale of a run on latents if neither user nor stages give it.
        data: the whole data set.
        images: its training and held-out images.
        codec: the opened codec; None for a run on pixels.
    """

    config: RunConfig
    data: ImageData
    images: tuple[ImageData, ImageData]
    codec: Codec | None

    def encoded(self, device: torch.device, progress: Progress | None = None) -> PreparedRun:
        """Encode the images of a run on latents, and set codec.scale if it is open.

        Args:
            device: device of the codec.
            progress: called with (done, total) while images are encoded.

        Raises:
            UserError: if all latents are equal.
            NotFiniteError: if a latent is not finite.
        """
        if self.codec is None:
            return PreparedRun(config=self.config, parts=self.images)
        latents, scale = encode_parts(
            self.codec,
            self.images,
            scale=self.config.codec.factor,
            mirrored=self.config.training.flip,
            device=device,
            progress=progress,
        )
        config = self.config
        if config.codec.scale is None:
            config = override(config, {"codec.scale": scale})
        return PreparedRun(config=config, parts=latents, decode=decoder(self.codec, scale))


def resolve_run(
    config: RunConfig,
    data: ImageData,
    result: StageResult | None,
    device: torch.device,
    *,
    processes: int = 1,
) -> ResolvedRun:
    """Complete a run's configuration (see RESOLVED) and check it; a resolved configuration stays as it is.

    Args:
        config: as given: a preset or a stored configuration with all changes, and with the stages of the result.
        data: the whole data set that data.source names.
        result: the result that the stages are from, if it is known.
        device: training device.
        processes: number of processes that train together.

    Raises:
        UserError: if anything would stop the training later; see `check`.
    """
    config = _with_declared_scale(config)
    codec = open_codec(config.codec, device) if config.codec.used else None
    images = data.split(config.data.held_out)
    resolved = override(
        config,
        _together(
            _paths(config),
            _of_images(config, data, images[0]),
            _of_input(data, codec),
            _of_stages(config, codec, result),
            _of_device(config, device),
        ),
    )
    check(resolved, images, device, processes)
    return ResolvedRun(config=resolved, data=data, images=images, codec=codec)


def _with_declared_scale(config: RunConfig) -> RunConfig:
    """Set codec.scale and codec.shift if the scale is the autoencoder's own."""
    found = with_declared_scale(config.codec)
    if found == config.codec:
        return config
    return override(config, {"codec.scale": found.scale, "codec.shift": found.shift})


def open_new(data: DataConfig) -> ImageData:
    """Open the data of a new run, whatever a preset or another run has recorded of its own."""
    return open_configured(dataclasses.replace(data, fingerprint="", shape=()))


def _together(*steps: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that all steps set; no two steps set the same key."""
    keys = [key for step in steps for key in step]
    assert len(keys) == len(set(keys)), keys
    return {key: value for step in steps for key, value in step.items()}


def _paths(config: RunConfig) -> dict[str, Any]:
    """Set data.source, codec.source, training.init_from and evaluation.reference."""
    return {
        "data.source": located(config.data.source),
        "codec.source": located_codec(config.codec.source),
        "training.init_from": _absolute(config.training.init_from),
        "evaluation.reference": _absolute(config.evaluation.reference),
    }


def _absolute(path: str) -> str:
    """Return a path made absolute; links in an absolute path stay, so that resolving again changes nothing."""
    given = Path(path).expanduser()
    return str(given if given.is_absolute() else given.resolve()) if path else ""


def _of_images(config: RunConfig, data: ImageData, training: ImageData) -> dict[str, Any]:
    """Set data.shape, data.fingerprint, data.class_counts and data.class_names."""
    return {
        "data.shape": data.shape,
        "data.fingerprint": data.fingerprint,
        "data.class_counts": class_counts(training, config.network.num_classes),
        "data.class_names": class_names(training, config.network.num_classes) or config.data.class_names,
    }


def require_channels(given: Mapping[str, Any], channels: int) -> None:
    """Raise UserError if the user gives other channels than those of the network's input, which are set from the data."""
    network = given.get("network")
    whole = network.get("channels", channels) if isinstance(network, Mapping) else channels
    wanted = given.get("network.channels", whole)
    require(
        wanted == channels,
        f"network.channels={wanted}: the images (or latents) have {channels} channels; leave it out, or convert them",
    )


def _of_input(data: ImageData, codec: Codec | None) -> dict[str, Any]:
    """Set network.channels; for a run on latents also codec.shape and codec.fingerprint."""
    if codec is None:
        return {"network.channels": data.shape[0]}
    shape = codec.latent_shape(data.shape)
    return {"network.channels": shape[0], "codec.shape": shape, "codec.fingerprint": codec.fingerprint}


def _of_stages(config: RunConfig, codec: Codec | None, result: StageResult | None) -> dict[str, Any]:
    """Set codec.scale if the stages were found on latents: their edges hold for latents of that scale only."""
    if result is None:
        return {}
    require_same_input(result, config.codec, codec, config.training.init_from)
    return {} if result.scale is None else {"codec.scale": result.scale}


def _of_device(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """Set training.precision."""
    return {"training.precision": precision_name(config.training.precision, device)}
