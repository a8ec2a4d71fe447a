"""Bringing images to one size: exactly as they are, centre-cropped or resized."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

Fit = Literal["exact", "crop", "resize"]


def fit_image(image: Image.Image, size: tuple[int, int], fit: Fit) -> Image.Image:
    """Resample (Lanczos) an 8-bit grey or RGB image to size = (height, width).

    "crop" scales the image until its shorter side fits and keeps the centre, in one resampling; "resize" changes the
    aspect ratio; "exact" returns the image as it is.
    """
    height, width = size
    if fit == "exact" or image.size == (width, height):
        return image
    if fit == "resize":
        return image.resize((width, height), Image.Resampling.LANCZOS)
    scale = min(image.width / width, image.height / height)
    left, top = (image.width - scale * width) / 2, (image.height - scale * height) / 2
    box = (left, top, left + scale * width, top + scale * height)
    box = (max(box[0], 0.0), max(box[1], 0.0), min(box[2], image.width), min(box[3], image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def fit_array(
    images: npt.NDArray[np.uint8], size: tuple[int, int] | None, fit: Fit, name: str
) -> npt.NDArray[np.uint8]:
    """Bring images (N, C, H, W), C = 1 or 3, to size; returned as they are (memory maps too) where the size agrees.

    Raises:
        ValueError: if fit is "exact" and the size differs.
    """
    found: tuple[int, int] = (images.shape[2], images.shape[3])
    if size is None or found == tuple(size):
        return images
    if fit == "exact":
        raise wrong_size(name, "its images", found, size)
    fitted = np.empty((*images.shape[:2], *size), np.uint8)
    for row, image in zip(fitted, images, strict=True):
        for plane, source in zip(row, image, strict=True):
            plane[:] = np.asarray(fit_image(Image.fromarray(np.ascontiguousarray(source)), size, fit))
    return fitted


def wrong_size(name: str, what: str, found: tuple[int, int], size: tuple[int, int]) -> ValueError:
    """Return the error for images that are not of the size asked for."""
    return ValueError(
        f"{name}: {what}: height x width {found[0]}x{found[1]} instead of data.size={size[0]}x{size[1]}; "
        f"add --fit crop or --fit resize"
    )
