"""Runs on latents: opening their codec, encoding their data, decoding their samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..codecs import open_codec
from ..config import CodecConfig, RunConfig
from ..contracts import Codec
from ..data import ImageData, to_uint8
from ..latents import LatentData, cached_latents, encode_images
from .progress import Progress

PIXELS_AT_ONCE = 1 << 22  # of decoded images, so that a codec's activations fit into memory


def located_codec(codec: CodecConfig) -> CodecConfig:
    """Return a codec with the path of its folder made absolute: a run is used from other folders too."""
    path = Path(codec.source).expanduser()
    if not codec.source or not path.exists():
        return codec
    return dataclasses.replace(codec, source=str(path.resolve()))


def with_codec(config: RunConfig, device: torch.device | str) -> tuple[RunConfig, Codec | None]:
    """Open a configuration's codec and record what its latents are; (config, None) for a run on pixels.

    Raises:
        ValueError: if the codec has no source, cannot be opened, or makes no latents of such images.
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
    """Encode training and held-out images (or take them from the cache) and record the scale.

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
        others = dataclasses.replace(latents, latents=latents.latents[:0], mirrored=None, labels=None)
    recorded = dataclasses.replace(config, codec=dataclasses.replace(config.codec, scale=scale))
    return recorded, (latents, others)


def decoder(codec: Codec, scale: float) -> Callable[[Tensor], Tensor]:
    """Return the map from scaled latents (B, c, h, w) to images (B, C, H, W) in [-1, 1], a few at a time."""

    @torch.no_grad()
    def decode(latents: Tensor) -> Tensor:
        first = codec.decode(latents[:1] / scale)
        rows = max(1, PIXELS_AT_ONCE // first[0].numel())
        return torch.cat([first, *(codec.decode(part / scale) for part in torch.split(latents[1:], rows) if len(part))])

    return decode


def reconstruct(config: RunConfig, images: Tensor, device: torch.device | str) -> Tensor:
    """Return images, uint8 (N, C, H, W), encoded and decoded by a run's codec."""
    codec = open_codec(config.codec, device)
    latents = encode_images(codec, images, device=device)
    decode = decoder(codec, 1.0)
    return torch.cat([to_uint8(decode(part.to(device))).cpu() for part in torch.split(latents, 256)])
