"""Feature functions: what a metric looks at. Each is named in every number computed from it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..contracts import FeatureExtractor

EXTRACT_BATCH = 256  # images per call of an extractor, so that a network's activations fit into memory


class PixelFeatures:
    """The pixels themselves: needs no download, and sees no more than brightness at fixed places."""

    name: str = "pixels"
    comparable_to: str = "pixel distances of the same data set only; not comparable with Inception FID"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to float32 (N, C*H*W) in [-1, 1].

        Raises:
            ValueError: if the images are not uint8 (N, C, H, W).
        """
        check_images("images", images)
        return images.flatten(1).to(torch.float32) / 127.5 - 1.0


FEATURES: dict[str, Callable[[], FeatureExtractor]] = {"pixels": PixelFeatures}


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
