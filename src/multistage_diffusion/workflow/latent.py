"""Runs on latents: opening the codec, encoding the data, decoding the samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import CodecConfig, RunConfig
from ..contracts import Codec
from ..data import ImageData, to_uint8
from ..data.rows import Rows
from ..errors import UserError
from ..latent.codecs import open_codec
from ..latent.latents import LatentData, cached_latents, encode_images
from ..progress import Progress
from ..stage_finding import StageResult

PIXELS_AT_ONCE = 1 << 22  # decoded values per call, so that a codec's activations fit into memory


def located_codec(codec: CodecConfig) -> CodecConfig:
    """Return a codec with the absolute path of its folder, because a run is used from other folders too."""
    path = Path(codec.source).expanduser()
    if not codec.source or not path.exists():
        return codec
    return dataclasses.replace(codec, source=str(path.resolve()))


def with_codec(config: RunConfig, device: torch.device | str) -> tuple[RunConfig, Codec | None]:
    """Open a configuration's codec and record the shape and fingerprint; (config, None) for a run on pixels.

    Raises:
        UserError: if the codec has no source, cannot be opened, or cannot encode such images.
    """
    if not config.codec.used:
        return config, None
    codec = open_codec(config.codec, device)
    channels, height, width = config.data.shape
    shape = codec.latent_shape((channels, height, width))
    recorded = dataclasses.replace(located_codec(config.codec), shape=shape, fingerprint=codec.fingerprint)
    network = dataclasses.replace(config.network, channels=shape[0])
    return dataclasses.replace(config, codec=recorded, network=network), codec


def encode_parts(
    config: RunConfig,
    codec: Codec,
    parts: tuple[ImageData, ImageData],
    device: torch.device | str,
    progress: Progress | None = None,
) -> tuple[RunConfig, tuple[LatentData, LatentData]]:
    """Encode training and held-out images (or read them from the cache) and record the scale.

    Returns:
        (config with codec.scale, (training latents, held-out latents)), both scaled by it.
    """
    training, held_out = parts
    latents, scale = cached_latents(
        codec,
        training,
        scale=config.codec.scale,
        mirrored=config.training.flip,
        device=device,
        progress=progress,
    )
    if len(held_out):
        others, _ = cached_latents(codec, held_out, scale=scale, device=device, progress=progress)
    else:
        others = latents.subset([])
    recorded = dataclasses.replace(config, codec=dataclasses.replace(config.codec, scale=scale))
    return recorded, (latents, others)


def latents_for_stages(
    config: CodecConfig, data: ImageData, device: torch.device | str, progress: Progress | None = None
) -> tuple[LatentData, dict[str, Any]]:
    """Return the scaled latents of a data set, and the codec and scale that stage finding records."""
    codec = open_codec(config, device)
    latents, scale = cached_latents(codec, data, scale=config.scale, device=device, progress=progress)
    return latents, {"codec": codec.fingerprint, "scale": scale}


def with_stages(config: RunConfig, result: StageResult) -> RunConfig:
    """Return a configuration with the stages of a result.

    Raises:
        UserError: if the stages were found on other data than the network's input: another pixel range, other latents.
    """
    if not config.codec.used:
        if result.codec:
            raise UserError("stages: they were found on latents, but this run trains on pixels; give --codec, too")
        if result.data_range is None or tuple(result.data_range) != (-1.0, 1.0):
            raise UserError(
                f"stages: they were found with data_range {list(result.data_range or [])}, but networks train on "
                "[-1, 1], where their edges mean other noise; run msdiff stages without --data-range"
            )
        return dataclasses.replace(config, stages=result.stages())
    if not result.codec:
        raise UserError(
            "stages: they were found on pixels, but this run trains on latents, where their edges mean other noise; run "
            "msdiff stages with --codec"
        )
    if result.codec != config.codec.fingerprint:
        raise UserError("stages: they were found on the latents of another codec; run msdiff stages with this one")
    scale = config.codec.scale
    if scale is not None and result.scale is not None and abs(scale / result.scale - 1) > 1e-3:
        raise UserError(
            f"stages: they were found on latents times {result.scale:.6g}, but codec.scale={scale:.6g}; leave it out"
        )
    codec = dataclasses.replace(config.codec, scale=result.scale)
    return dataclasses.replace(config, codec=codec, stages=result.stages())


def decoder(codec: Codec, scale: float) -> Callable[[Tensor], Tensor]:
    """Return the function that maps scaled latents (B, c, h, w) to images (B, C, H, W) in [-1, 1], a few at a time."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        first = codec.decode(latents[:1] / scale)
        rows = max(1, PIXELS_AT_ONCE // first[0].numel())
        return torch.cat([first, *(codec.decode(part / scale) for part in torch.split(latents[1:], rows) if len(part))])

    return decode


def reconstruct(config: RunConfig, images: Tensor | Rows, device: torch.device | str) -> Tensor:
    """Return images, uint8 (N, C, H, W) or the rows of a data set, encoded and decoded by a run's codec."""
    codec = open_codec(config.codec, device)
    latents = encode_images(codec, images, device=device)
    decode = decoder(codec, 1.0)
    return torch.cat([to_uint8(decode(part.to(device))).cpu() for part in torch.split(latents, 256)])
