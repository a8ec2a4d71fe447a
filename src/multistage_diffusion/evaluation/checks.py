"""Checks of arguments: images, sets of images, pairs of feature sets."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.rows import Rows
from ..errors import UserError


def check_images(name: str, images: Tensor | Rows) -> None:
    """Check that images are a non-empty uint8 (N, C, H, W) tensor, or at least one row of a data set.

    Raises:
        UserError: naming the argument, its dtype and its shape.
    """
    if not isinstance(images, Tensor):
        if not len(images):
            raise UserError(f"{name}: no images")
        return
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise UserError(
            f"{name}: expected non-empty uint8 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )


def image_shape(images: Tensor | Rows) -> tuple[int, ...]:
    """Return the shape (C, H, W) of one image."""
    return tuple(images.shape[-3:])


def check_sets(samples: Tensor | Rows, train: Tensor | Rows, held_out: Tensor | Rows) -> None:
    """Check that samples, training and held-out images are images of one shape.

    Raises:
        UserError: naming the set and its shape.
    """
    for name, images in (("samples", samples), ("train", train), ("held_out", held_out)):
        check_images(name, images)
        if image_shape(images) != image_shape(train):
            raise UserError(f"{name}: images of shape {image_shape(images)}, training {image_shape(train)}")


def check_features(a: Tensor, b: Tensor, rows: int) -> None:
    """Check that two sets of features are finite, (N, D) and (M, D) with N, M >= rows.

    Raises:
        UserError: naming the shape, or the number of rows that are not finite.
    """
    for features in (a, b):
        if features.ndim != 2 or len(features) < rows:
            raise UserError(f"features: expected (N, D) with N >= {rows}, got {tuple(features.shape)}")
        if not bool(torch.isfinite(features).all()):
            bad = int((~torch.isfinite(features)).any(dim=1).sum())
            raise UserError(f"features: {bad} of {len(features)} rows hold NaN or infinity")
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features: {a.shape[1]} and {b.shape[1]} dimensions; both sets need the same")
