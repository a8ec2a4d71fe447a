"""The check of image arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError


def check_images(name: str, images: Tensor) -> None:
    """Check that images are a non-empty uint8 (N, C, H, W) tensor.

    Raises:
        UserError: naming the argument, its dtype and its shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise UserError(
            f"{name}: expected non-empty uint8 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
