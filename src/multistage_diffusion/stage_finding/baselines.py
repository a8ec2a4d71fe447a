"""Baseline stages for comparison with the optimal denoiser's (the paper's Table 4): even in time or in log-SNR.

They do not depend on the data. Times are grouped into contiguous groups, each close to its centre (the interval
clustering of Go et al. 2023, "Addressing negative transfer in diffusion models").
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch

from ..schedules.vp import VP
from .boundaries import Array, Partition, cheapest_groups
from .settings import require_setting

Baseline = Literal["timestep", "snr"]


def baseline_partition(
    algorithm: Baseline, stages: int, *, measure: VP | None = None, times: int = 200
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Divide the times t_max i / M, i = 1..M, into groups of similar values.

    Args:
        algorithm: "timestep" (the value of a time is the time itself) or "snr" (its log-SNR).
        stages: the number n of groups, 1 <= n <= M.
        measure: the kernel of the times; None for the standard VP.
        times: M.

    Returns:
        The first time of each group except the first group, and the curves: lists "t" and "value" (M numbers each) and
        "objective_value" (the cost of `centred_groups`).

    Raises:
        UserError: if there are fewer times than groups.
    """
    require_setting(1 <= stages <= times, f"stages={stages} must be between 1 and the {times} times of the grid")
    measure = measure or VP()
    numbers = np.arange(1, times + 1, dtype=np.float64)
    t = numbers / times * measure.t_max
    if algorithm == "timestep":
        values = t
        first, steps = centred_groups(numbers, stages)  # integers make ties exact on every machine
        cost = steps / times * measure.t_max
    else:
        values = measure.log_snr(torch.from_numpy(t)).numpy()
        first, cost = centred_groups(values, stages)
    curves = {"t": t.tolist(), "value": np.round(values, 6).tolist(), "objective_value": cost}
    return tuple(float(t[i]) for i in first), curves


def centred_groups(values: Array, stages: int) -> Partition:
    """Divide M values into n contiguous groups whose values lie closest to the centre of their group.

    Group sizes are M/(2n) to 3M/(2n), rounded outwards. The cost of a group is the sum of |v - v_centre|; the centre is
    the element at 0-based index len // 2. Dynamic programming finds the least total cost. Ties prefer the longest last
    group, then the longest second-to-last group, and so on.

    Args:
        values: (M,), ascending or descending.
        stages: n, 1 <= n <= M.

    Returns:
        The index of the first element of each group except the first group, and the cost.
    """
    count = len(values)
    start, end = np.arange(count)[:, None], np.arange(count + 1)[None, :]
    length = end - start
    centre = np.minimum(start + np.maximum(length, 0) // 2, count - 1)
    sums = np.concatenate(([0.0], np.abs(values - values[0]).cumsum()))  # ascending
    middle = np.abs(values[centre] - values[0])
    before = (centre - start) * middle - (sums[centre] - sums[start])
    after = (sums[end] - sums[centre]) - (end - centre) * middle
    least, most = max(1, count // (2 * stages)), -(-3 * count // (2 * stages))
    cost = np.where((least <= length) & (length <= most), before + after, np.inf)
    return cheapest_groups(cost, stages)[-1]
