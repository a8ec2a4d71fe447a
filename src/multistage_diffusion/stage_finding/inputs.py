"""Preparation of the images for stage finding, with checks before any long computation."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..data.rows import batches, read, row_type
from .posterior import Images, TiledImages
from .searching import OUTSIDE
from .settings import StageSettings, require_setting
from .sharing import Sharing

_AT_ONCE = 4096  # images whose values are checked at a time


def tiled_images(
    images: Images,
    settings: StageSettings,
    device: torch.device | str | None,
    memory: int,
    sharing: Sharing,
) -> TiledImages:
    """Check the images and return them as TiledImages; raise UserError if they are unusable."""
    shape = (len(images), *row_shape(images))
    require_setting(len(shape) >= 2 and 0 not in shape, f"images.shape={shape} must be (N, C, H, W), not empty")
    check_kind("images", images, settings)
    data = TiledImages(
        images,
        settings.data_range or (0.0, 1.0),
        device=device,
        budget=memory,
        shard=sharing.shard,
        reduce=sharing.reduce if sharing.image_shards > 1 else None,
    )
    check_values("images", images, settings)
    alike = "there is only one image" if len(data) == 1 else f"all {len(data)} images are the same"
    require_setting(
        data.vary(),
        f"{alike}, so the optimal denoiser is the same at every noise level; give at least two different images",
    )
    return data


def row_shape(images: Images) -> tuple[int, ...]:
    """Return the shape of one image."""
    return tuple(images.shape[1:] if isinstance(images, Tensor) else images.shape)


def check_kind(name: str, images: Images, settings: StageSettings) -> None:
    """Raise UserError unless images are floating point, or uint8 with a data range."""
    kind = images.dtype if isinstance(images, Tensor) else row_type(images)
    pixels = kind in (np.uint8, torch.uint8)
    floats = kind.is_floating_point if isinstance(kind, torch.dtype) else np.issubdtype(kind, np.floating)
    require_setting(pixels or floats, f"{name}.dtype={kind} must be uint8 or floating point")
    require_setting(
        not pixels or settings.data_range is not None, "data_range=None is for floats; uint8 pixels need a range"
    )


def check_values(name: str, images: Images, settings: StageSettings) -> None:
    """Raise UserError for floating-point values outside the data range."""
    kind = images.dtype if isinstance(images, Tensor) else row_type(images)
    if kind in (np.uint8, torch.uint8) or settings.data_range is None:
        return
    low, high = settings.data_range
    slack = 1e-4 * (high - low)
    ranges = [(float(part.min()), float(part.max())) for part in batches(images, _AT_ONCE)]
    found = min(least for least, _ in ranges), max(most for _, most in ranges)
    require_setting(
        low - slack <= found[0] and found[1] <= high + slack,
        f"{name} have values from {found[0]:.4g} to {found[1]:.4g}, outside data_range=({low:g}, {high:g}); pass "
        "the range the network trains on",
    )


def held_out_rows(images: Images, data: TiledImages, shape: tuple[int, ...], settings: StageSettings) -> Tensor | None:
    """Check a random subset of the held-out images and return it as centred rows (M, D); None if there are none."""
    if len(images) == 0:
        return None
    require_setting(
        row_shape(images) == shape,
        f"held_out.shape={(len(images), *row_shape(images))} must be that of the images, (M, {', '.join(map(str, shape))})",
    )
    check_kind("held_out", images, settings)
    check_values("held_out", images, settings)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))[:OUTSIDE]
    rows = data.as_rows(read(images, order))
    require_setting(
        bool(torch.isfinite(rows).all()), "held_out images hold NaN or infinite values; remove those images"
    )
    return rows
