"""Sizes of the images of a data set, read from some of its files before it is opened."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from .bounded import FILE_LIMIT
from .sources.folders import contents
from .visible import sort_out

PEEKED = 64  # images whose size is read


def image_sizes(path: Path, count: int = PEEKED) -> list[tuple[int, int]]:
    """Return (height, width) of at most `count` images, evenly spaced, in a folder or zip file, as stored.

    Files that cannot be read are left out: opening the data set names them.

    Args:
        path: a folder or zip file.
        count: most images that are looked at.

    Raises:
        UserError: if the folder or file cannot be read.
    """
    names, read = contents(path)
    found, sizes = sort_out(str(path), names).images, []
    for number in np.unique(np.linspace(0, len(found) - 1, count).astype(int)) if found else ():
        try:
            with Image.open(io.BytesIO(read(found[number], FILE_LIMIT))) as image:
                turned = image.getexif().get(0x0112, 1) >= 5  # the EXIF orientations that swap height and width
                sizes.append((image.width, image.height) if turned else (image.height, image.width))
        except Exception:  # Pillow raises many exception types on broken files
            continue
    return sizes
