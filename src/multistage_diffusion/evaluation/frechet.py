"""The Fréchet distance between features (FID with Inception features), in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from ..progress import interruptible
from .checks import check_features
from .image_sets import ImageSets
from .moments import MAX_DIMS, Moments, moments
from .registry import METRICS, Display, Metric, MetricValue


@METRICS.add("frechet")
class Frechet(Metric):
    """Fréchet distance between samples and real images."""

    shown = (
        Display(
            name="frechet",
            label="Fréchet distance",
            words="Distance of features; with Inception features, the FID.",
            better="lower",
        ),
    )
    needs = frozenset({"moments"})

    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        """Return "frechet"."""
        return {"frechet": MetricValue(value=frechet_between(sets.samples.moments, sets.real.moments))}


@METRICS.add("frechet-reconstructed")
class FrechetReconstructed(Metric):
    """Fréchet distance between reconstructed held-out images and training images: what a codec alone costs."""

    shown = (
        Display(
            name="frechet_reconstructed",
            label="Fréchet distance of reconstructions",
            words="Held-out images through the codec, beside training images: the best that samples can reach.",
            better="lower",
        ),
    )
    needs = frozenset({"moments", "training", "reconstructed"})
    with_real_baseline = False

    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        """Return "frechet_reconstructed"."""
        assert sets.reconstructed is not None  # in `needs`
        assert sets.training is not None
        distance = frechet_between(sets.reconstructed.moments, sets.training.moments)
        return {"frechet_reconstructed": MetricValue(value=distance)}


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to two feature sets (Dowson & Landau 1982; FID, Heusel et al. 2017).

    Args:
        a: features (N, D), N >= 2.
        b: features (M, D), M >= 2.

    Returns:
        The distance (a squared length), >= 0, in squared units of the features.

    Raises:
        UserError: for unequal D, D > 4096, fewer than 2 rows, or values that are not finite.
    """
    check_features(a, b, rows=2)
    return frechet_between(moments(a), moments(b))


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
    # seconds for thousands of dimensions
    cross = interruptible(lambda: _trace_of_root(a.covariance, b.covariance))
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(float(distance), 0.0)


def _trace_of_root(a: Tensor, b: Tensor) -> Tensor:
    """Return tr((a^1/2 b a^1/2)^1/2) of two covariances."""
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ b @ root
    trace: Tensor = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    return trace
