"""The order of each step of a sampler: as published, or lowered for steps that are too long for their order.

A step of order 2 or 3 extrapolates the denoiser's outputs over the whole step length h = ln(sigma_s / sigma_t). It is
better than DDIM (order 1) only if h is small enough. The limit is lowest at the end of a trajectory, where the images
of a data set separate. docs/sampling.md has the study behind the lengths below; benchmarks/samplers.py repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

# (solver, method): maximum step length in ln sigma for each order; orders that are not listed have no limit.
# At order 2, singlestep noise prediction weights the second output by (sigma_s - sigma_t) / 2 r1 for every h. The exact
# weight falls as 1/h, so long steps overshoot, with errors up to sigma_s. Order 3 of multistep data prediction
# extrapolates a parabola over steps that grow towards low noise.
LONGEST_STEP: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("dpm", "singlestep"): {2: 1.5, 3: 2.0},
    ("dpm++", "multistep"): {3: 1.0},
}
LONGEST_LAST_STEP = 1.5  # for a last step of order 2 or 3
LONGEST_HEUN_STEP = 1.5  # Heun's trapezoidal rule is in sigma: in a longer step the end slope has too much weight


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


def lowered_singlestep_orders(sigmas: Sequence[float], order: int, solver: str) -> list[int]:
    """Return lowered orders of singlestep steps; the last has order 1, and no step is longer than LONGEST_STEP.

    `sigmas` holds one sigma per call and the end. A step of order o spans o intervals of it.
    """
    longest, orders, first = LONGEST_STEP.get((solver, "singlestep"), {}), list[int](), 0
    calls = len(sigmas) - 1
    while first < calls:
        found = min(order, max(1, calls - first - 1))
        while math.log(sigmas[first] / sigmas[first + found]) > longest.get(found, math.inf):
            found -= 1
        orders.append(found)
        first += found
    return orders


def lowered_multistep_orders(sigmas: Sequence[float], order: int, solver: str) -> list[int]:
    """Return lowered orders of multistep steps along sigmas: rising with the history, falling to 1 at the end.

    No step is longer than LONGEST_STEP allows for its order.
    """
    longest, orders, calls = LONGEST_STEP.get((solver, "multistep"), {}), list[int](), len(sigmas) - 1
    for i, (start, end) in enumerate(pairwise(sigmas)):
        found = min(order, i + 1, calls - i)
        while math.log(start / end) > longest.get(found, math.inf):
            found -= 1
        orders.append(found)
    return orders


def corrected_heun_steps(sigmas: Sequence[float], calls: int) -> set[int] | None:
    """Return the indices of Heun's corrected steps along sigmas (and on to 0); None if `calls` allows more sigmas.

    The step to 0 and steps longer than LONGEST_HEUN_STEP are not corrected. If the calls suffice for only some of the
    other steps, the last ones are corrected, because the correction has the largest effect there.
    """
    fit = [i for i, (start, end) in enumerate(pairwise(sigmas)) if math.log(start / end) <= LONGEST_HEUN_STEP]
    unused = calls - len(sigmas)
    if len(fit) < unused - (calls % 2 == 0) and len(sigmas) < calls:
        return None
    return set(fit[max(0, len(fit) - unused) :]) if unused > 0 else set()
