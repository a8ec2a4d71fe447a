"""Preparation of the images for stage finding, with checks before any long computation."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .posterior import TiledImages
from .searching import OUTSIDE
from .settings import StageSettings, require_setting
from .sharing import Sharing


def tiled_images(
    images: Tensor | npt.NDArray[Any],
    settings: StageSettings,
    device: torch.device | str | None,
    memory: int,
    sharing: Sharing,
) -> TiledImages:
    """Check the images and return them as TiledImages; raise UserError if they are unusable."""
    require_setting(
        images.ndim >= 2 and 0 not in images.shape,
        f"images.shape={tuple(images.shape)} must be (N, C, H, W), not empty",
    )
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
    require_setting(
        data.vary(),
        f"all {len(data)} images are the same, so the optimal denoiser is the same at every noise level; give at least "
        "two different images",
    )
    return data


def check_kind(name: str, images: Tensor | npt.NDArray[Any], settings: StageSettings) -> None:
    """Raise UserError unless images are floating point, or uint8 with a data range."""
    pixels = images.dtype in (np.uint8, torch.uint8)
    floats = images.is_floating_point() if isinstance(images, Tensor) else np.issubdtype(images.dtype, np.floating)
    require_setting(pixels or floats, f"{name}.dtype={images.dtype} must be uint8 or floating point")
    require_setting(
        not pixels or settings.data_range is not None, "data_range=None is for floats; uint8 pixels need a range"
    )


def check_values(name: str, images: Tensor | npt.NDArray[Any], settings: StageSettings) -> None:
    """Raise UserError for floating-point values outside the data range."""
    if images.dtype in (np.uint8, torch.uint8) or settings.data_range is None:
        return
    low, high = settings.data_range
    slack = 1e-4 * (high - low)
    found = float(images.min()), float(images.max())
    require_setting(
        low - slack <= found[0] and found[1] <= high + slack,
        f"{name} have values from {found[0]:.4g} to {found[1]:.4g}, outside data_range=({low:g}, {high:g}); pass "
        "the range the network trains on",
    )


def held_out_rows(
    images: Tensor | npt.NDArray[Any], data: TiledImages, shape: tuple[int, ...], settings: StageSettings
) -> Tensor | None:
    """Check a random subset of the held-out images and return it as centred rows (M, D); None if there are none."""
    if len(images) == 0:
        return None
    require_setting(
        tuple(images.shape[1:]) == shape,
        f"held_out.shape={tuple(images.shape)} must be that of the images, (M, {', '.join(map(str, shape))})",
    )
    check_kind("held_out", images, settings)
    check_values("held_out", images, settings)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))[:OUTSIDE]
    picked = images[order.to(images.device)] if isinstance(images, Tensor) else torch.from_numpy(images[order.numpy()])
    rows = data.as_rows(picked)
    require_setting(
        bool(torch.isfinite(rows).all()), "held_out images hold NaN or infinite values; remove those images"
    )
    return rows
