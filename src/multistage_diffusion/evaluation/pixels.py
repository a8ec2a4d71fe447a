"""The pixels of images as features."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_images
from .registry import FEATURES, FeatureExtractor


@FEATURES.add("pixels")
class PixelFeatures(FeatureExtractor):
    """The pixels as features: no download, but sensitive only to brightness at fixed positions."""

    title = "pixels"
    comparable_to = "pixel distances of the same data set only; not comparable with Inception FID"
    preprocessing = "images at their own size, in [-1, 1]"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to float32 (N, C*H*W) in [-1, 1].

        Raises:
            UserError: if the images are not uint8 (N, C, H, W).
        """
        check_images("images", images)
        return images.flatten(1).to(torch.float32) / 127.5 - 1.0
