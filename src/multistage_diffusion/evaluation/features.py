"""Feature functions: what a metric looks at. Each is named in every number computed from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..contracts import FeatureExtractor
from .classifier import SIZE, prepare, pretrained

EXTRACT_BATCH = 256  # images per call of an extractor, so that a network's activations fit into memory


class PixelFeatures:
    """The pixels themselves: needs no download, and sees no more than brightness at fixed places."""

    name: str = "pixels"
    comparable_to: str = "pixel distances of the same data set only; not comparable with Inception FID"
    preprocessing: str = "images at their own size, in [-1, 1]"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to float32 (N, C*H*W) in [-1, 1].

        Raises:
            ValueError: if the images are not uint8 (N, C, H, W).
        """
        check_images("images", images)
        return images.flatten(1).to(torch.float32) / 127.5 - 1.0


class ClassifierFeatures:
    """What a small classifier of Fashion-MNIST that ships with the package sees, before its last layer."""

    comparable_to: str = "other figures of these features; not comparable with Inception FID"
    preprocessing: str = f"grey in [-1, 1], scaled to {SIZE}x{SIZE} (bilinear, antialiased)"

    def __init__(self) -> None:
        self.model, digest = pretrained()
        self.name = f"fashion-classifier ({digest})"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, 1 or 3, H, W) to float32 (N, 128), >= 0."""
        return self.model.features(self._prepared(images))

    def logits(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, 1 or 3, H, W) to the logits of the ten classes, float32 (N, 10)."""
        logits: Tensor = self.model(self._prepared(images))
        return logits

    def _prepared(self, images: Tensor) -> Tensor:
        check_images("images", images)
        self.model.to(images.device)
        return prepare(images)


FEATURES: dict[str, Callable[[], FeatureExtractor]] = {
    "pixels": PixelFeatures,
    "fashion-classifier": ClassifierFeatures,
}


def get_features(name: str) -> FeatureExtractor:
    """Return a feature extractor by name.

    Raises:
        ValueError: for an unknown name, listing the known ones.
    """
    if name not in FEATURES:
        raise ValueError(f"features={name!r} is unknown; choose one of {', '.join(FEATURES)}")
    return FEATURES[name]()


def extract(extractor: FeatureExtractor, images: Tensor) -> Tensor:
    """Map uint8 images (N, C, H, W) to features (N, D), a batch at a time."""
    return torch.cat([extractor(batch) for batch in torch.split(images, EXTRACT_BATCH)])


def check_images(name: str, images: Tensor) -> None:
    """Refuse what is not a non-empty uint8 (N, C, H, W) tensor.

    Raises:
        ValueError: naming the argument, its dtype and its shape.
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"{name}: expected non-empty uint8 images (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
        )
