"""The order of each step of a sampler: as published, or lowered for steps that are too long for their order.

A step of order 2 or 3 extrapolates the denoiser's outputs over the whole step length h = ln(sigma_s / sigma_t). It is
better than DDIM (order 1) only if h is small enough. The limit is lowest at the end of a trajectory, where the images
of a data set separate. docs/sampling.md has the study behind the solvers' longest steps; benchmarks/samplers.py repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise


def singlestep_orders(calls: int, order: int) -> list[int]:
    """Return the published orders of the steps of singlestep DPM-Solver (Lu et al. 2022a, "DPM-Solver-fast").

    The orders sum to `calls`: as many steps of order `order` as fit, then one step with the remaining calls. If `order`
    is 3 and divides `calls`, the last orders are 2, 1.
    """
    if order == 3 and calls % 3 == 0:
        return [3] * (calls // 3 - 1) + [2, 1]
    return [order] * (calls // order) + ([calls % order] if calls % order else [])


def multistep_orders(calls: int, order: int) -> list[int]:
    """Return the published orders of multistep steps: 1, 2, .. up to `order`, then back to 1 if below 10 calls."""
    rising = [min(order, i + 1) for i in range(calls)]
    return [min(o, calls - i) for i, o in enumerate(rising)] if calls < 10 else rising


def lowered_singlestep_orders(sigmas: Sequence[float], order: int, longest: Mapping[int, float]) -> list[int]:
    """Return lowered orders of singlestep steps; the last has order 1, and no step is longer than `longest`.

    Args:
        sigmas: one sigma per call and the end. A step of order o spans o intervals of it.
        order: the highest order.
        longest: maximum step length in ln sigma for each order; orders that are not listed have no limit.
    """
    orders, first = list[int](), 0
    calls = len(sigmas) - 1
    while first < calls:
        found = min(order, max(1, calls - first - 1))
        while math.log(sigmas[first] / sigmas[first + found]) > longest.get(found, math.inf):
            found -= 1
        orders.append(found)
        first += found
    return orders


def lowered_multistep_orders(sigmas: Sequence[float], order: int, longest: Mapping[int, float]) -> list[int]:
    """Return lowered orders of multistep steps along sigmas: rising with the history, falling to 1 at the end.

    No step is longer than `longest` allows for its order; arguments as in `lowered_singlestep_orders`, but a step spans
    one interval.
    """
    orders, calls = list[int](), len(sigmas) - 1
    for i, (start, end) in enumerate(pairwise(sigmas)):
        found = min(order, i + 1, calls - i)
        while math.log(start / end) > longest.get(found, math.inf):
            found -= 1
        orders.append(found)
    return orders
