"""Samples of a run: a tensor of images that knows the classes and gives images of Pillow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from .pictures import to_pil


class Samples(Tensor):
    """Images, uint8 (N, C, H, W), C = 1 or 3: a tensor like any other, with the class of each.

    Whatever is computed from it, a slice included, is an ordinary tensor.

    Attributes:
        labels: class of each, int64 (N,); None for an unconditional run.
        class_names: name of the class of each; None for an unconditional run.
    """

    labels: Tensor | None
    class_names: Sequence[str] | None

    @classmethod
    def of(cls, images: Tensor, labels: Tensor | None = None, class_names: Sequence[str] | None = None) -> Samples:
        """Return images as samples; the storage is shared."""
        samples = images.as_subclass(cls)
        samples.labels, samples.class_names = labels, class_names
        return samples

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute as with an ordinary tensor, and return one."""
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def pil(self) -> list[Image.Image]:
        """Return the images of Pillow, in mode "L" (grey) or "RGB"."""
        return [to_pil(image) for image in self.as_subclass(Tensor).cpu()]
