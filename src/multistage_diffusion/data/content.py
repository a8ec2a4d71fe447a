"""What a data set's pixels and labels are known by: its fingerprint, and the place of each image in the held-out split."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class Content:
    """What is computed from all images of a data set.

    Attributes:
        fingerprint: SHA-256, in hex, of the shape, the pixels and the labels.
        positions: of each image in [0, 1), float64 (N,), see `position`.
    """

    fingerprint: str
    positions: npt.NDArray[np.float64]


class Fingerprint:
    """The fingerprint of images that come in parts, in order.

    Args:
        count: number of images.
        shape: (C, H, W) of each.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self._digest = hashlib.sha256(repr((count, *shape)).encode())

    def add(self, images: npt.NDArray[np.uint8]) -> None:
        """Add C-contiguous images."""
        self._digest.update(images.reshape(-1).data)

    def finish(self, labels: npt.NDArray[Any] | None) -> str:
        """Return the fingerprint of the images added and their labels."""
        if labels is not None:
            self._digest.update(labels.astype("<i8").tobytes())
        return self._digest.hexdigest()


def position(image: npt.NDArray[np.uint8]) -> float:
    """Map the shape and the pixels of an image (C, H, W), C-contiguous, to [0, 1)."""
    digest = hashlib.blake2b(repr(image.shape).encode(), digest_size=8)
    digest.update(image.reshape(-1).data)
    return (int.from_bytes(digest.digest(), "big") >> 11) * 2.0**-53  # 53 bits: exact in a float, never rounded up to 1


def content_of(
    parts: Iterable[npt.NDArray[np.uint8]], count: int, shape: tuple[int, ...], labels: npt.NDArray[Any] | None
) -> Content:
    """Return the content of `count` images (C, H, W) that come in parts, in order, with their labels."""
    fingerprint, positions = Fingerprint(count, shape), []
    for images in parts:
        fingerprint.add(images)
        positions += [position(image) for image in images]
    return Content(fingerprint.finish(labels), np.array(positions, np.float64))
