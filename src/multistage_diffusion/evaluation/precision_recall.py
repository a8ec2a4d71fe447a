"""Improved precision and recall (Kynkäänniemi et al. 2019), in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import UserError
from .checks import check_features
from .image_sets import ImageSets
from .registry import METRICS, Display, Metric, MetricValue

NEIGHBOURS = 3  # k, as published
CHUNK = 256  # rows compared at a time: their distances to thousands of others fit into the CPU cache
_ROUNDING = 1e-12  # bound of the relative error of |a|² + |b|² - 2 a·b in float64, valid for thousands of dimensions


@METRICS.add("precision-recall")
class PrecisionRecall(Metric):
    """Precision and recall of samples, on equally many samples and real images.

    Args:
        k: number of neighbours.
    """

    shown = (
        Display(
            name="precision",
            label="Precision",
            words="Share of samples that lie among real images: how real they look.",
            better="higher",
            unit="%",
        ),
        Display(
            name="recall",
            label="Recall",
            words="Share of real images that lie among samples: how much of the variety they cover.",
            better="higher",
            unit="%",
        ),
    )
    needs = frozenset({"features"})

    def __init__(self, k: int = NEIGHBOURS) -> None:
        self.k, self.least = k, k + 1

    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        """Return "precision" and "recall"."""
        count = min(len(sets.samples.features), len(sets.real.features))
        samples, real = sets.samples.features[:count], sets.real.features[:count]
        check_features(samples, real, rows=2)
        # the same for samples and for training images in their place
        reach = sets.real.once(("reach", self.k, count), lambda: _reach(real, self.k, CHUNK))
        values = _covered(real, samples, reach, _reach(samples, self.k, CHUNK), CHUNK)
        settings = {"k": self.k, "images": count}
        return {
            name: MetricValue(value=value, settings=settings)
            for name, value in zip(("precision", "recall"), values, strict=True)
        }


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, chunk: int = CHUNK) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eqs. 1 and 2).

    The manifold of a set is the union of closed balls around its points. The radius of a ball is the distance to the
    point's k-th nearest other point. Precision is the share of fake features in the real manifold. Recall is the share
    of real features in the fake manifold.

    Args:
        real: features (N, D), N > k.
        fake: features (M, D), M > k.
        k: number of neighbours.
        chunk: rows compared at a time; bounds the memory.

    Returns:
        (precision, recall), each in [0, 1].

    Raises:
        UserError: for unequal D, k < 1, k >= N or M, or values that are not finite.
    """
    if k < 1 or k >= min(len(real), len(fake)):
        raise UserError(
            f"k={k} must be at least 1 and below the number of features ({len(real)} real, {len(fake)} fake)"
        )
    check_features(real, fake, rows=2)
    return _covered(real, fake, _reach(real, k, chunk), _reach(fake, k, chunk), chunk)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return |a_i - b_j|², float64 (N, M), exactly 0 for rows that are equal up to rounding."""
    a, b = a.to(torch.float64), b.to(torch.float64)
    norms = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    squared = norms - 2 * (a @ b.T)
    return torch.where(squared > _ROUNDING * norms, squared, 0.0)


def _reach(centres: Tensor, k: int, chunk: int) -> Tensor:
    """Return the squared distance of every row to its k-th nearest other row, float64 (N,)."""
    # k + 1 because every centre is its own nearest row
    radii = [
        _squared_distances(c, centres).topk(k + 1, largest=False).values[:, -1] for c in torch.split(centres, chunk)
    ]
    return torch.cat(radii) * (1 + 1e-9)  # balls are closed: rounding must not exclude boundary points


def _covered(real: Tensor, fake: Tensor, reach_real: Tensor, reach_fake: Tensor, chunk: int) -> tuple[float, float]:
    """Return the share of fake features in a ball of a real one, and of real features in a ball of a fake one."""
    precise = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    recalled = []
    for rows, reach in zip(torch.split(real, chunk), torch.split(reach_real, chunk), strict=True):
        squared = _squared_distances(rows, fake)
        precise |= (squared <= reach[:, None]).any(dim=0)
        recalled.append((squared <= reach_fake).any(dim=1))
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())
