"""Memorisation: samples that are copies of training images, found by pixel distances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.rows import Rows, batches
from .checks import check_features, check_images, check_sets
from .image_sets import ImageSets
from .pixels import PixelFeatures
from .registry import METRICS, Display, Metric, MetricValue

PERCENTILE = 5.0  # of held-out images counted as "near a training image"
CHUNK = 256  # rows compared at a time: their distances to thousands of others fit into the CPU cache
_ROUGH = 1e-5  # bound of the relative error of |b|² - 2 a·b in float32, valid for thousands of dimensions
_PAIRS = 1 << 16  # pairs of rows compared at a time in float64


@METRICS.add("memorisation")
class Memorised(Metric):
    """Share of samples near a training image, on all images and their pixels."""

    shown = (
        Display(
            name="memorised",
            label="Memorised",
            words="Share as near to a training image as the nearest 5 % of held-out images are. A share far above that of "
            "held-out images means copying.",
            better="lower",
            unit="%",
            comparable_to="samples of runs on the same data, whatever the features: the distances are of pixels",
        ),
    )
    needs = frozenset({"images", "training"})
    least = 1
    all_images = True
    with_real_baseline = False

    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        """Return "memorised"; real is the share of held-out images, about 5 %."""
        assert sets.training is not None  # in `needs`
        found = memorisation(sets.samples.image_rows, sets.training.image_rows, sets.real.image_rows)
        settings = {"threshold": found.threshold}
        return {"memorised": MetricValue(value=found.share, real=found.held_out_share, settings=settings)}


def nearest(a: Tensor, b: Tensor, chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """Find the nearest row of b (Euclidean) for every row of a; ties give the first row.

    Args:
        a: features (N, D).
        b: features (M, D), M >= 1.
        chunk: rows of a compared at a time with 16 * chunk rows of b; bounds the memory.

    Returns:
        (distance, index): float64 (N,) and int64 (N,).

    Raises:
        UserError: for unequal D, no rows, or values that are not finite.
    """
    check_features(a, b, rows=1)
    return _nearest_in(a, torch.split(b, 16 * chunk), chunk)


def nearest_image(images: Tensor | Rows, among: Tensor | Rows) -> tuple[Tensor, Tensor]:
    """Find the nearest image of `among` (Euclidean distance of pixels in [-1, 1]) for every image; ties give the first.

    Args:
        images: uint8 (N, C, H, W), N >= 1.
        among: uint8 (M, C, H, W), M >= 1. Parts of both are read at a time.

    Returns:
        (distance, index): float64 (N,) and int64 (N,).

    Raises:
        UserError: for images of another type, or none.
    """
    for name, given in (("images", images), ("among", among)):
        check_images(name, given)
    pixels, rows = PixelFeatures(), 16 * CHUNK
    found = [_nearest_in(pixels(part), map(pixels, batches(among, rows)), CHUNK) for part in batches(images, rows)]
    return torch.cat([distance for distance, _ in found]), torch.cat([index for _, index in found])


def _nearest_in(a: Tensor, parts: Iterable[Tensor], chunk: int) -> tuple[Tensor, Tensor]:
    """Return what `nearest` does; `parts` are consecutive rows of b."""
    best = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
    index = torch.zeros(len(a), dtype=torch.int64, device=a.device)
    start = 0
    for part in parts:
        for row in range(0, len(a), chunk):
            rows = slice(row, row + chunk)
            squared, at = _nearest_of(a[rows], part)
            nearer = squared < best[rows]
            best[rows] = torch.where(nearer, squared, best[rows])
            index[rows] = torch.where(nearer, at + start, index[rows])
        start += len(part)
    return best.sqrt(), index


def _nearest_of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return for every row of a the smallest squared distance to b, float64, and the first row of b that has it.

    Float32 products select the candidate rows within rounding error. Only the candidates are compared in float64.
    """
    norms_a, norms_b = (x.to(torch.float32).square().sum(dim=1) for x in (a, b))
    rough = torch.addmm(norms_b[None], a.to(torch.float32), b.to(torch.float32).T, alpha=-2)
    slack = _ROUGH * (norms_a + norms_b.max())
    least = rough.min(dim=1).values
    row, column = (rough <= (least + slack)[:, None]).nonzero(as_tuple=True)
    exact = torch.cat(
        [
            (a[r].to(torch.float64) - b[c].to(torch.float64)).square().sum(dim=1)
            for r, c in zip(torch.split(row, _PAIRS), torch.split(column, _PAIRS), strict=True)
        ]
    )
    squared = torch.full((len(a),), torch.inf, dtype=torch.float64, device=a.device)
    squared = squared.scatter_reduce(0, row, exact, "amin")
    ties = exact == squared[row]
    at = torch.full((len(a),), len(b), dtype=torch.int64, device=a.device)
    return squared, at.scatter_reduce(0, row[ties], column[ties], "amin")


@dataclass(frozen=True, kw_only=True)
class Memorisation:
    """The share of samples that are close to a training image.

    Attributes:
        share: share of samples within `threshold` of a training image, in [0, 1].
        held_out_share: the same for held-out images; about 0.05 by definition of the threshold.
        threshold: 5th percentile of the held-out images' distances to their nearest training images.
        distance: distance of each sample to its nearest training image, float64 (N,); Euclidean, pixels in [-1, 1].
        index: index of that training image, int64 (N,).
    """

    share: float
    held_out_share: float
    threshold: float
    distance: Tensor
    index: Tensor


def memorisation(samples: Tensor | Rows, train: Tensor | Rows, held_out: Tensor | Rows) -> Memorisation:
    """Compare the pixel distances of samples to training images with those of held-out images.

    Args:
        samples: uint8 (N, C, H, W).
        train: uint8 (M, C, H, W), the images trained on.
        held_out: uint8 (K, C, H, W), real images not trained on.

    Raises:
        UserError: for images of another type or of unequal shapes.
    """
    check_sets(samples, train, held_out)
    distance, index = nearest_image(samples, train)
    own, _ = nearest_image(held_out, train)
    threshold = torch.quantile(own, PERCENTILE / 100)
    return Memorisation(
        share=float((distance <= threshold).double().mean()),
        held_out_share=float((own <= threshold).double().mean()),
        threshold=float(threshold),
        distance=distance,
        index=index,
    )
