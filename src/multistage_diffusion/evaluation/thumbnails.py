"""Thumbnails and contrasts as features: small, for any images, without a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_images
from .registry import FEATURES, FeatureExtractor

CELLS = 8  # of a thumbnail, a side
SCALES = (1, 2, 4)  # pixels between the two that are compared
WEIGHT = 4.0  # of the contrasts, which vary less than the means


@FEATURES.add("thumbnails")
class ThumbnailFeatures(FeatureExtractor):
    """A thumbnail of 8x8 cells, and contrasts at three scales: any images, no download; coarse beside Inception.

    There are 73 features of a grey image and 219 of a colour image, so a few hundred images have a covariance.
    """

    title = "thumbnails"
    comparable_to = "thumbnail distances of the same data set only; not comparable with Inception FID"
    preprocessing = "means of 8x8 cells, and mean absolute differences of pixels 1, 2 and 4 apart, in [-1, 1]"

    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to float32 (N, 73 C).

        The features are the means over 8x8 cells, then for 1, 2 and 4 pixels four times the mean absolute differences of
        pixels that far apart across, down and along both; 0 where an image is too small.

        Raises:
            UserError: if the images are not uint8 (N, C, H, W).
        """
        check_images("images", images)
        x = images.to(torch.float32) / 127.5 - 1.0
        contrasts = [_contrast(x, down, across) for s in SCALES for down, across in ((0, s), (s, 0), (s, s))]
        return torch.cat([F.adaptive_avg_pool2d(x, CELLS).flatten(1), *contrasts], dim=1)


def _contrast(x: Tensor, down: int, across: int) -> Tensor:
    """Return the mean absolute difference of pixels so far apart, per channel: (N, C, H, W) -> (N, C)."""
    height, width = x.shape[2] - down, x.shape[3] - across
    if min(height, width) < 1:
        return x.new_zeros(x.shape[:2])
    return WEIGHT * (x[:, :, down:, across:] - x[:, :, :height, :width]).abs().mean((2, 3))
