"""Decoding of one image file to the pixels of a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from .content import position
from .fitting import fit_image, reachable
from .opening import decode
from .options import Options

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Loaded:
    """One image at the target size, if it can reach it.

    Attributes:
        pixels: uint8 (C, H, W), C = 1 or 3.
        found: (height, width) in the file.
        several, brightest: see `opening.Decoded`.
        position: see `content.position`.
    """

    pixels: Pixels
    found: Size
    several: bool
    brightest: int | None
    position: float


def load(content: bytes, options: Options) -> Loaded:
    """Decode an image file and bring it to the size of the options.

    An image that cannot reach the size keeps its own: it is not a bad file.

    Raises:
        Exception: of many types, for a file that cannot be decoded.
    """
    size, fit = options.size, options.fit
    decoded = decode(content, options.max_pixels, size if fit in ("crop", "resize") else None)
    image, found = decoded.image, decoded.found
    if size is not None and reachable(found, size, fit):
        image = fit_image(image, size, fit, decoded.extent)
    pixels = planes(image)
    return Loaded(pixels, found, decoded.several, decoded.brightest, position(pixels))


def planes(image: Image.Image) -> Pixels:
    """Return an 8-bit grey or RGB image as an array (C, H, W)."""
    bands = image.getbands()
    content = b"".join(image.tobytes("raw", band) for band in bands)  # faster than a transposed copy
    return np.frombuffer(content, np.uint8).reshape(len(bands), image.height, image.width)


def coloured(pixels: Pixels, channels: int) -> Pixels:
    """Return grey pixels (1, H, W) repeated in `channels` channels; others unchanged."""
    return np.repeat(pixels, channels, axis=0) if len(pixels) < channels else pixels
