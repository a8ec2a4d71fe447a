"""Data sets of uint8 images and class labels. Fingerprint and held-out split depend only on the content."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import UserError

_CHUNK_BYTES = 1 << 24
_MAX_CLASSES = 1 << 16


@dataclass(frozen=True, eq=False)
class ImageData:
    """A data set of images of one size.

    Attributes:
        images: uint8 (N, C, H, W); may be a memory map.
        labels: class numbers from 0, int64 (N,), or None.
        name: the source it was opened from; starts every error message.
        class_names: one name per class; default: the class numbers.
        content: (height, width) of the centred unpadded part, if all images were padded from one size; else None.
        passed_over: number of unused files beside the images, by reason.

    Raises:
        UserError: if pixels or labels have another type, shape or range.
    """

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.int64] | None
    name: str
    class_names: tuple[str, ...] = ()
    content: tuple[int, int] | None = None
    passed_over: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.images.dtype != np.uint8 or self.images.ndim != 4:
            raise UserError(
                f"{self.name}: images must be uint8 (N, C, H, W), not {self.images.dtype} of shape {self.images.shape}"
            )
        if self.labels is None:
            if self.class_names:
                raise UserError(f"{self.name}: class_names={self.class_names} without labels; give labels too")
            return
        object.__setattr__(self, "labels", _checked_labels(self.labels, len(self.images), self.name))
        largest = int(self.labels.max(initial=-1))
        if not self.class_names:
            object.__setattr__(self, "class_names", tuple(str(label) for label in range(largest + 1)))
        if largest >= len(self.class_names):
            raise UserError(f"{self.name}: label {largest} has no name among the {len(self.class_names)} class_names")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of every image."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels; a subset keeps the number of the full data set."""
        return len(self.class_names)

    def describe(self) -> str:
        """Return one line with the image count, class count, size, grey or colour, and the unused files."""
        channels, height, width = self.shape
        parts = [
            f"{len(self)} images",
            "no labels" if self.labels is None else f"{self.num_classes} classes",
            f"{height} x {width}",
            "grey" if channels == 1 else "colour",
        ]
        if self.passed_over:
            why = ", ".join(f"{count} {reason}" for reason, count in self.passed_over.items())
            parts.append(f"{sum(self.passed_over.values())} passed over ({why})")
        return f"{self.name}: {', '.join(parts)}"

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the shape, the pixels and the labels (without `name`, `class_names` and `content`)."""
        digest = hashlib.sha256(repr(self.images.shape).encode())
        rows = max(1, _CHUNK_BYTES // max(1, int(np.prod(self.shape))))
        for start in range(0, len(self), rows):
            digest.update(self.images[start : start + rows].tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        return digest.hexdigest()

    def tensor(self) -> Tensor:
        """Return the images as a uint8 tensor that shares their memory; do not write to it."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.images)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageData:
        """Return the images at the given indices, in that order, copied into memory."""
        index = np.asarray(indices, dtype=np.int64)
        labels = None if self.labels is None else self.labels[index]
        return ImageData(np.asarray(self.images[index]), labels, self.name, self.class_names, self.content)

    def split(self, held_out: float) -> tuple[ImageData, ImageData]:
        """Return (train, held-out) data.

        An image is held out if the hash of its pixels and shape, mapped to [0, 1), is below held_out. Equal images are
        therefore on the same side. Order, file names and other images have no effect.

        Args:
            held_out: expected held-out share in [0, 1); 0 holds nothing out.

        Raises:
            UserError: if held_out is out of range, or if it is positive and one side is empty.
        """
        if not 0 <= held_out < 1:
            raise UserError(f"data.held_out={held_out} must be in [0, 1)")
        if held_out == 0:
            return self, self.subset([])
        below = np.array([_position(image) < held_out for image in self.images], dtype=bool)
        if below.all() or not below.any():
            side = "training" if len(self) and below.all() else "held-out"
            raise UserError(
                f"data.held_out={held_out} leaves no {side} images among the {len(self)} of {self.name}; use another "
                f"share or 0, or more images"
            )
        return self.subset(np.flatnonzero(~below)), self.subset(np.flatnonzero(below))


def _checked_labels(labels: npt.NDArray[np.int64], count: int, name: str) -> npt.NDArray[np.int64]:
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise UserError(
            f"{name}: labels must be whole numbers of shape (N,), not {labels.dtype} of shape {labels.shape}"
        )
    if len(labels) != count:
        raise UserError(f"{name}: {len(labels)} labels for {count} images; give one per image")
    if count and not 0 <= labels.min() <= labels.max() < _MAX_CLASSES:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{name}: label {wrong} is not in 0..{_MAX_CLASSES - 1}; number the classes from 0")
    return labels.astype(np.int64, copy=False)


def _position(image: npt.NDArray[np.uint8]) -> float:
    """Map the content of an image to [0, 1)."""
    digest = hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) * 2.0**-53  # 53 bits: exact in a float, never rounded up to 1


def to_float(images: Tensor | npt.NDArray[np.uint8]) -> Tensor:
    """Map uint8 pixels 0..255 to float32 in [-1, 1] (x / 127.5 - 1), same shape; a tensor stays on its device."""
    pixels = images if isinstance(images, Tensor) else torch.tensor(np.asarray(images))
    if pixels.dtype != torch.uint8:
        raise UserError(f"to_float: images must be uint8, not {pixels.dtype}")
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8 pixels, same shape and device; round to the nearest level and clamp."""
    return ((x.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
