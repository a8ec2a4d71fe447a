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
from ..latent.codecs import declared_scale, open_codec
from ..latent.latents import LatentData, cached_latents, encode_images
from ..progress import Progress

PIXELS_AT_ONCE = 1 << 22  # decoded values per call, so that a codec's activations fit into memory


def located_codec(source: str) -> str:
    """Return a codec's source with the absolute path of its folder, because a run is used from other folders too."""
    path = Path(source).expanduser()
    return str(path.resolve()) if source not in ("", "identity") and path.exists() else source


def codec_like(trained: CodecConfig, source: str | None) -> CodecConfig:
    """Return the codec of a run that starts from a trained one, on whose latents its network can go on.

    Scale and shift stay those that the network was trained with. The subfolder stays only for the same source.

    Args:
        trained: the codec of the trained run.
        source: the autoencoder that the user names; None: that of the trained run.
    """
    if source is None or source == trained.source or located_codec(source) == trained.source:
        return dataclasses.replace(trained, fingerprint="")
    return dataclasses.replace(trained, source=source, subfolder="", fingerprint="")


def with_declared_scale(config: CodecConfig) -> CodecConfig:
    """Return a codec's configuration with the autoencoder's own scale and shift in place of scale="config"."""
    if config.scale != "config":
        return config
    scale, shift = declared_scale(config)
    return dataclasses.replace(config, scale=scale, shift=shift)


def recorded_scale(codec: CodecConfig) -> float:
    """Return the scale that a run on latents records when it starts.

    Raises:
        UserError: if there is none.
    """
    if codec.factor is None:
        raise UserError(
            f"codec.scale={codec.scale}: a run on latents records a number there; was its config.json edited?"
        )
    return codec.factor


def encode_parts(
    codec: Codec,
    parts: tuple[ImageData, ImageData],
    *,
    scale: float | None,
    mirrored: bool,
    device: torch.device | str,
    progress: Progress | None = None,
) -> tuple[tuple[LatentData, LatentData], float]:
    """Encode training and held-out images, or read their latents from the cache.

    Args:
        codec: on `device`.
        parts: training and held-out images.
        scale: factor of the latents; None: measured on the training latents.
        mirrored: encode the mirrored training images, too.
        device: device of the codec.
        progress: called with (done, total) while images are encoded.

    Returns:
        ((training latents, held-out latents) times the scale, the scale).
    """
    training, held_out = parts
    latents, scale = cached_latents(codec, training, scale=scale, mirrored=mirrored, device=device, progress=progress)
    if len(held_out):
        others, _ = cached_latents(codec, held_out, scale=scale, device=device, progress=progress)
    else:
        others = latents.subset([])
    return (latents, others), scale


def latents_for_stages(
    config: CodecConfig, data: ImageData, device: torch.device | str, progress: Progress | None = None
) -> tuple[LatentData, dict[str, Any]]:
    """Return the scaled latents of a data set, and the codec and scale that stage finding records."""
    config = with_declared_scale(config)
    codec = open_codec(config, device)
    latents, scale = cached_latents(codec, data, scale=config.factor, device=device, progress=progress)
    return latents, {"codec": codec.fingerprint, "scale": scale}


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
