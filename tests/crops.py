"""A small folder of real images: pieces of the two photographs that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("china", "flower")


def photograph(name: str) -> Image.Image:
    """Return a photograph, 640 x 427 pixels."""
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(f"{name}.jpg"))


def make_crops(folder: Path, count: int = 60, sides: tuple[int, int] = (48, 96)) -> Path:
    """Write crops of random sides (least, most) in a folder per photograph, JPEG and PNG in turn.

    Returns:
        The folder.
    """
    draws, photographs = np.random.default_rng(0), [photograph(name) for name in NAMES]
    for name in NAMES:
        (folder / name).mkdir(parents=True)
    for number in range(count):
        kind = number % len(NAMES)
        height, width = draws.integers(sides[0], sides[1] + 1, 2)
        left, top = draws.integers(640 - width + 1), draws.integers(427 - height + 1)
        crop = photographs[kind].crop((left, top, left + width, top + height))
        crop.save(folder / NAMES[kind] / f"{number:03d}.{'jpg' if number % 4 < 2 else 'png'}", quality=90)
    return folder
