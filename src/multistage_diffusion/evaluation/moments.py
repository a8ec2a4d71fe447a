"""Mean and covariance of features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_DIMS = 4096  # a float64 covariance of this size takes 128 MiB and its eigenvalues about a minute


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Mean and unbiased covariance of a feature set.

    Attributes:
        mean: float64 (D,).
        covariance: float64 (D, D), possibly singular.
        count: number of images.
    """

    mean: Tensor
    covariance: Tensor
    count: int


def moments(features: Tensor) -> Moments:
    """Return the moments of features (N, D), N >= 2, in float64."""
    features = features.to(torch.float64)
    mean = features.mean(dim=0)
    centred = features - mean
    return Moments(mean=mean, covariance=centred.T @ centred / (len(features) - 1), count=len(features))
