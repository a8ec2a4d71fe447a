"""Finding the stages of a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ..config import CodecConfig, DataConfig
from ..data import ImageData, open_configured
from ..schedules import VP, NoiseSchedule
from ..splitting import Ranks, SplitResult, SplitSettings, find_stages
from ..training.devices import resolve_device
from .latent import latents_to_split
from .progress import Progress

GIB = 1 << 30


def split(
    data: ImageData | str | DataConfig,
    settings: SplitSettings | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    codec: CodecConfig | None = None,
    out: Path | str | None = None,
    device: str | None = None,
    memory: float = 2.0,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> SplitResult:
    """Find the stages of a data set's training images.

    Args:
        data: an opened data set (used whole), or where it is (its held-out images are left out, and shown to algorithm 2).
        settings: algorithm and options.
        schedule: the kernel in whose time edges are printed; default VP.
        codec: split the latents of this autoencoder instead of pixels.
        out: where to write the result as JSON, with its curves as PNG beside it.
        device: default CUDA when there is one.
        memory: GiB to stay under, roughly.
        ranks: processes (of torchrun) that share the work; default this one alone. Only the first writes.
        progress: called with (done, total).

    Raises:
        UserError: if the data cannot be read or have no such stages.
    """
    settings, resolved = settings or SplitSettings(), resolve_device(device)
    held_out: Any = None
    if not isinstance(data, ImageData):
        config = DataConfig(source=data) if isinstance(data, str) else data
        data, others = open_configured(config).split(config.held_out)
        held_out = others.images
    images: Any = data.images
    kept: dict[str, Any] = {}
    if codec is not None:
        images, kept = latents_to_split(codec, data, resolved, progress)
        settings, held_out = dataclasses.replace(settings, data_range=None), None
    result = find_stages(
        images,
        settings,
        schedule=schedule or VP(),
        held_out=held_out,
        fingerprint=data.fingerprint,
        device=resolved,
        memory=int(memory * GIB),
        ranks=ranks,
        progress=progress,
        **kept,
    )
    if out is not None and (ranks is None or ranks.first):
        save_split(result, Path(out))
    return result


def save_split(result: SplitResult, path: Path) -> None:
    """Write a split as JSON, and its curves as PNG beside it."""
    from ..splitting.plots import plot_split  # matplotlib takes a while to import

    result.save(path)
    plot_split(result, path.with_suffix(".png"))
