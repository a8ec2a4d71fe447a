"""Confidence intervals of edges by the bootstrap over samples (Efron 1979)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from .. import rng
from ..errors import UserError

RESAMPLES = 400
LEVEL = 0.95
Array = npt.NDArray[np.float64]
Edges = tuple[float, ...]


def edge_intervals(
    read: Callable[[Array], Edges], samples: int, domain: tuple[float, float], *, seed: int, count: int
) -> list[tuple[float, float]]:
    """Return the 95 % interval of every edge: percentiles over resamples of the samples, drawn with replacement.

    The intervals cover the Monte Carlo error only: the variation over other noisy draws of the same images.

    Args:
        read: returns the edges for sample weights float64 (K,); raises UserError if there are no edges.
        samples: K. One image and noise at several times count as one sample.
        domain: (t_min, t_max). For a resample without edges, t_min enters the lower bound and t_max the upper bound.
        seed: of the resamples.
        count: number of edges.
    """
    draws = np.random.default_rng(rng.fold((seed, "bootstrap")) >> 1)
    found = np.empty((RESAMPLES, count))
    for row in found:
        try:
            row[:] = read(draws.multinomial(samples, np.full(samples, 1 / samples)).astype(np.float64))
        except UserError:
            row[:] = math.nan
    lost = np.isnan(found[:, :1])
    low = np.quantile(np.where(lost, domain[0], found), (1 - LEVEL) / 2, axis=0)
    high = np.quantile(np.where(lost, domain[1], found), (1 + LEVEL) / 2, axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def half_width(intervals: list[tuple[float, float]]) -> float:
    """Return half the width of the widest interval; 0 if there are no intervals."""
    return max(((high - low) / 2 for low, high in intervals), default=0.0)
