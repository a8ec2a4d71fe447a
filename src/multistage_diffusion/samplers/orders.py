"""The order of each step of a sampler: as published, or lowered where a step is too long for its order.

A step of order 2 or 3 extrapolates the denoiser's answers over the step's whole length h = ln(sigma_s / sigma_t). The result
is better than DDIM's, of order 1, only while h is not too long, and the end of a trajectory, where a data set's images part,
allows the least. docs/sampling.md has the study behind the lengths below; benchmarks/samplers.py repeats it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

# (solver, method): the longest step in ln sigma at each order; orders that are not named are good at any length.
# Singlestep noise prediction weights the second answer at order 2 by (sigma_s - sigma_t) / 2 r1 whatever h is; the exact weight
# falls as 1/h, so that long steps overshoot, by errors as large as sigma_s. Multistep data prediction of order 3 continues a
# parabola over steps that grow towards low noise.
LONGEST_STEP: Mapping[tuple[str, str], Mapping[int, float]] = {
    ("dpm", "singlestep"): {2: 1.5, 3: 2.0},
    ("dpm++", "multistep"): {3: 1.0},
}
LONGEST_LAST_STEP = 1.5  # of a last step whose order is not 1
LONGEST_HEUN_STEP = 1.5  # Heun's trapezium is in sigma: over a longer step the slope at its end has too much weight


def singlestep_orders(calls: int, order: int) -> list[int]:
    """Return the published orders of singlestep DPM-Solver's steps; they sum to `calls` (Lu et al. 2022a, "DPM-Solver-fast").

    As many steps of the order asked for as fit, the rest at the end; order 3 never ends on 3 but on 2, 1.
    """
    if order == 3 and calls % 3 == 0:
        return [3] * (calls // 3 - 1) + [2, 1]
    return [order] * (calls // order) + ([calls % order] if calls % order else [])


def multistep_orders(calls: int, order: int) -> list[int]:
    """Return the published orders of multistep steps: 1, 2, .. as history grows; below 10 steps falling to 1 at the end."""
    rising = [min(order, i + 1) for i in range(calls)]
    return [min(o, calls - i) for i, o in enumerate(rising)] if calls < 10 else rising


def lowered_singlestep_orders(sigmas: Sequence[float], order: int, solver: str) -> list[int]:
    """Return orders of singlestep steps along sigmas, one per call and the end; a step of order o spans o of them.

    The last step is of order 1, and none is longer than LONGEST_STEP.
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
    """Return orders of multistep steps along sigmas: as history grows, falling to 1 at the end, none over LONGEST_STEP."""
    longest, orders, calls = LONGEST_STEP.get((solver, "multistep"), {}), list[int](), len(sigmas) - 1
    for i, (start, end) in enumerate(pairwise(sigmas)):
        found = min(order, i + 1, calls - i)
        while math.log(start / end) > longest.get(found, math.inf):
            found -= 1
        orders.append(found)
    return orders


def corrected_heun_steps(sigmas: Sequence[float], calls: int) -> set[int] | None:
    """Return which of Heun's steps along sigmas (and on to 0) are corrected, or None if more sigmas are affordable.

    No step longer than LONGEST_HEUN_STEP is, nor the one to 0. If there are calls for some of the others only, the last are:
    that is where the correction tells.
    """
    fit = [i for i, (start, end) in enumerate(pairwise(sigmas)) if math.log(start / end) <= LONGEST_HEUN_STEP]
    unused = calls - len(sigmas)
    if len(fit) < unused - (calls % 2 == 0) and len(sigmas) < calls:
        return None
    return set(fit[max(0, len(fit) - unused) :]) if unused > 0 else set()
