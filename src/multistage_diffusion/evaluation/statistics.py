"""Mean and covariance of features, and the Fréchet distance between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import FeatureExtractor
from ..data.rows import Rows, batches
from ..errors import UserError
from ..memory import require_memory
from ..progress import Progress
from .features import EXTRACT_BATCH
from .image_check import check_images

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


def require_features(
    field: str,
    extractor: FeatureExtractor,
    shape: Sequence[int],
    count: int,
    device: torch.device | str = "cpu",
    sets: int = 1,
) -> None:
    """Raise before the computation if features have too many dimensions or do not fit into memory.

    Args:
        field: the setting that chose the features, with its value, for the message.
        extractor: feature function; called with one black image.
        shape: (C, H, W) of the images.
        count: images per set.
        device: where features are computed.
        sets: number of sets whose features are in memory at the same time.

    Raises:
        UserError: if the extractor does not accept the images, D > 4096, or the free memory is too small.
    """
    images = " x ".join(map(str, shape))
    try:
        dims = extractor(torch.zeros(1, *shape, dtype=torch.uint8, device=device)).shape[1]
    except UserError as error:
        raise UserError(f"{field}: {error}") from None
    if dims > MAX_DIMS:
        raise UserError(f"{field}: {dims} dimensions of images of {images} exceed {MAX_DIMS}; use other features")
    held = sets * 20 * count * dims + 5 * 8 * dims * dims  # float32, float64 and centred features; covariances, roots
    require_memory(held, f"count={count}, {field} of {dims} dimensions,", "take a smaller count, or other features")


def moments(features: Tensor) -> Moments:
    """Return the moments of features (N, D), N >= 2, in float64."""
    features = features.to(torch.float64)
    mean = features.mean(dim=0)
    centred = features - mean
    return Moments(mean=mean, covariance=centred.T @ centred / (len(features) - 1), count=len(features))


def image_moments(
    extractor: FeatureExtractor,
    images: Tensor | Rows,
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Moments:
    """Return the moments of images' features, accumulated batch by batch without keeping all features in memory.

    Args:
        extractor: feature function.
        images: uint8 (N, C, H, W), N >= 2, a tensor on any device or the rows of a data set, read batch by batch.
        device: where features are computed.
        progress: called with (images done, N).

    Returns:
        Moments on the CPU.
    """
    check_images("images", images)
    shift: Tensor | None = None
    done, count = 0, len(images)
    for batch in batches(images, EXTRACT_BATCH):
        features = extractor(batch.to(device)).to(torch.float64)
        if shift is None:  # subtracting the first batch's mean reduces cancellation
            shift = features.mean(dim=0)
            total, products = torch.zeros_like(shift), torch.zeros_like(torch.outer(shift, shift))
        centred = features - shift
        total += centred.sum(dim=0)
        products += centred.T @ centred
        done += len(batch)
        if progress is not None:
            progress(done, count)
    assert shift is not None
    mean = total / count
    covariance = (products - count * torch.outer(mean, mean)) / (count - 1)
    return Moments(mean=(mean + shift).cpu(), covariance=covariance.cpu(), count=count)


def frechet_between(a: Moments, b: Moments) -> float:
    """Return the Fréchet distance between two Gaussians (Dowson & Landau 1982; FID, Heusel et al. 2017).

    |mean_a - mean_b|² + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2), with symmetric eigenvalues in float64.

    Returns:
        The distance (a squared length), >= 0, in squared units of the features.

    Raises:
        UserError: for unequal D, D > 4096, or values that are not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"Fréchet distance: {len(a.mean)} and {len(b.mean)} feature dimensions; use the same features")
    if len(a.mean) > MAX_DIMS:
        raise UserError(
            f"Fréchet distance: {len(a.mean)} feature dimensions exceed {MAX_DIMS}; use smaller images or other features"
        )
    if not all(bool(torch.isfinite(m.covariance).all() and torch.isfinite(m.mean).all()) for m in (a, b)):
        raise UserError("Fréchet distance: features are not all finite; look at the images and the feature extractor")
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)
