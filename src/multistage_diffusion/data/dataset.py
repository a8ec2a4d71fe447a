"""Data sets of uint8 images and class labels. Fingerprint and held-out split depend only on the content."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import UserError
from ..progress import reading
from .content import Content, Fingerprint, position
from .rows import Index, LabelledRows, Rows, View, as_rows, chunks

_CHUNK_BYTES = 1 << 24
_MAX_CLASSES = 1 << 16


class ImageData(LabelledRows):
    """A data set of uint8 images of one size, read by index.

    Subsets and splits are views: they read from the same storage.

    Args:
        images: an array (N, C, H, W), in memory or mapped, or any other `Rows` of uint8 images.
        labels: class numbers from 0, any integer type, (N,), or None.
        name: the source it was opened from; starts every error message.
        class_names: one name per class; default: the class numbers.
        content: (height, width) of the centred unpadded part, if all images were padded from one size; else None.
        skipped: number of unused files beside the images, by reason.
        known: fingerprint and positions, if they have been computed; None: computed when they are needed.
        parts: returns the fingerprint of some rows, given them and what computes it, from an earlier time if it is known.

    Attributes:
        labels: int64 (N,), or None.

    Raises:
        UserError: if pixels or labels have another type, shape or range.
    """

    def __init__(
        self,
        images: Rows | npt.NDArray[np.uint8],
        labels: npt.NDArray[np.integer[Any]] | None,
        name: str,
        class_names: tuple[str, ...] = (),
        content: tuple[int, int] | None = None,
        skipped: Mapping[str, int] | None = None,
        known: Content | None = None,
        parts: Callable[[Index, Callable[[], str]], str] | None = None,
    ) -> None:
        if isinstance(images, np.ndarray) and (images.dtype != np.uint8 or images.ndim != 4):
            raise UserError(f"{name}: images must be uint8 (N, C, H, W), not {images.dtype} of shape {images.shape}")
        if labels is None:
            if class_names:
                raise UserError(f"{name}: class_names={class_names} without labels; give labels too")
            super().__init__(as_rows(images), None, name, ())
        else:
            checked = _checked_labels(labels, len(images), name)
            super().__init__(as_rows(images), checked, name, _class_names(checked, class_names, name))
        self.content, self.skipped, self._known = content, dict(skipped or {}), known
        self._parts = parts

    def describe(self) -> str:
        """Return one line with the image count, class count, size, grey or colour, and the unused files."""
        from ..escaping import counted  # the trainer has no use for it

        channels, height, width = self.shape
        parts = [
            counted(len(self), "image"),
            "no labels" if self.labels is None else counted(self.num_classes, "class"),
            f"{height} x {width}",
            "grey" if channels == 1 else "colour",
        ]
        if self.skipped:
            why = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items())
            parts.append(f"{counted(sum(self.skipped.values()), 'file')} skipped ({why})")
        return f"{self.name}: {', '.join(parts)}"

    def chunks(self) -> Iterator[npt.NDArray[np.uint8]]:
        """Yield all images in order, as arrays (n, C, H, W) of about 16 MiB."""
        return chunks(self.storage, max(1, _CHUNK_BYTES // max(1, math.prod(self.shape))))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, of the shape, the pixels and the labels (without `name`, `class_names` and `content`)."""
        if self._known is not None:
            return self._known.fingerprint
        if self._parts is not None and isinstance(self.storage, View):
            return self._parts(self.storage.index, self._fingerprint)
        return self._fingerprint()

    def _fingerprint(self) -> str:
        fingerprint, done = Fingerprint(len(self), self.shape), 0
        with reading() as told:
            for images in self.chunks():
                fingerprint.add(images)
                done += len(images)
                told(done, len(self))
        return fingerprint.finish(self.labels)

    def subset(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> ImageData:
        """Return a view of the images at the given indices, in that order."""
        index = self._index(indices)
        labels = None if self.labels is None else self.labels[index]
        return ImageData(
            View(self.storage, index), labels, self.name, self.class_names, self.content, parts=self._parts
        )

    def split(self, held_out: float) -> tuple[ImageData, ImageData]:
        """Return (train, held-out) data as views.

        An image is held out if the hash of its pixels and shape, mapped to [0, 1), is below held_out. Equal images are
        therefore on the same side. Order, file names and other images have no effect. Of few images, where that
        would hold out none, the one of the lowest hash is.

        Args:
            held_out: expected held-out share in [0, 1); 0 holds nothing out.

        Raises:
            UserError: if held_out is out of range, or if it is positive and all images are copies of one or no image is
                left to train on.
        """
        if not 0 <= held_out < 1:
            raise UserError(f"data.held_out={held_out} must be in [0, 1)")
        if held_out == 0:
            return self, self.subset([])
        positions = self._positions
        if not len(positions) or positions.min() == positions.max():
            raise UserError(
                f"data.held_out={held_out}: {self.name} has no two different images, so none can be held out; "
                "add images"
            )
        below = positions < held_out
        if below.all():
            raise UserError(
                f"data.held_out={held_out} leaves no training images among the {len(self)} of {self.name}; use a lower "
                f"share, or more images"
            )
        if not below.any():
            below = positions == positions.min()
        return self.subset(np.flatnonzero(~below)), self.subset(np.flatnonzero(below))

    @cached_property
    def _positions(self) -> npt.NDArray[np.float64]:
        """Position of each image in [0, 1), float64 (N,)."""
        if self._known is not None:
            return self._known.positions
        return np.fromiter((position(image) for part in self.chunks() for image in part), np.float64, len(self))


def _checked_labels(labels: npt.NDArray[np.integer[Any]], count: int, name: str) -> npt.NDArray[np.int64]:
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise UserError(f"{name}: labels must be integers of shape (N,), not {labels.dtype} of shape {labels.shape}")
    if len(labels) != count:
        raise UserError(f"{name}: {len(labels)} labels for {count} images; give one per image")
    if count and not 0 <= labels.min() <= labels.max() < _MAX_CLASSES:
        wrong = labels.min() if labels.min() < 0 else labels.max()
        raise UserError(f"{name}: label {wrong} is not in 0..{_MAX_CLASSES - 1}; number the classes from 0")
    return labels.astype(np.int64, copy=False)


def _class_names(labels: npt.NDArray[np.int64], names: tuple[str, ...], name: str) -> tuple[str, ...]:
    largest = int(labels.max(initial=-1))
    if names and largest >= len(names):
        raise UserError(f"{name}: label {largest}, but {len(names)} class_names; labels count from 0")
    return names or tuple(str(label) for label in range(largest + 1))


def to_float(images: Tensor | npt.NDArray[np.uint8]) -> Tensor:
    """Map uint8 pixels 0..255 to float32 in [-1, 1] (x / 127.5 - 1), same shape; a tensor stays on its device."""
    pixels = images if isinstance(images, Tensor) else torch.tensor(np.asarray(images))
    if pixels.dtype != torch.uint8:
        raise UserError(f"to_float: images must be uint8, not {pixels.dtype}")
    return pixels.to(torch.float32) / 127.5 - 1.0


def to_uint8(x: Tensor) -> Tensor:
    """Map floats in [-1, 1] to uint8 pixels, same shape and device; round to the nearest level and clamp."""
    return ((x.to(torch.float32) + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
