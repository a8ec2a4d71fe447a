"""The check of image arguments."""

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
