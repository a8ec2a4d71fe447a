"""Stage edges (the times at which one stage ends and the next begins) computed from similarities."""

from __future__ import annotations

import contextlib
import itertools
import math
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import UserError
from .similarity import Similarities

Rule = Literal["interval-mean", "pointwise"]
Objective = Literal["total-distance", "mean-similarity"]
Array = npt.NDArray[np.float64]

# Half-width of the moving average of rule "pointwise", as a share of the time domain.
SMOOTHING = 0.01


class OverlapError(UserError):
    """Algorithm 1's outer stages overlap: no middle stage is left."""


class ThreeStages:
    """Algorithm 1's edges, computed from samples with optional weights (for a bootstrap).

    Rule "interval-mean": t1 is the largest tau with a mean S0 over {t < tau} of at least alpha. t2 is the smallest tau
    with a mean S1 over {t >= tau} of at least alpha. Rule "pointwise": S0 and S1 are smoothed by a moving average over
    |t - tau| <= 1 % of the domain (a shorter window at its ends). t1 is the first tau with S0 below alpha, t2 the last
    tau with S1 below alpha. (S0 rises again towards the noisy end, so first and last differ.)

    Args:
        curves: Algorithm 1's samples (K, G).
        alpha: the similarity threshold, in (0, 1].
        rule: as above.
        grid: tau takes the multiples of t_max / grid inside the domain.
        domain: (t_min, t_max) of the sampled times.
    """

    def __init__(
        self, curves: Similarities, *, alpha: float, rule: Rule, grid: int, domain: tuple[float, float]
    ) -> None:
        self.alpha, self.rule = alpha, rule
        taus = torch.arange(1, grid, dtype=torch.float64) * domain[1] / grid
        self.taus = taus[taus > domain[0]]
        self.t, order = curves.t.flatten().sort()
        self.s0, self.s1 = curves.s0.flatten()[order], curves.s1.flatten()[order]
        self.owner = order // curves.t.shape[1]
        if rule == "interval-mean":
            first = torch.searchsorted(self.t, self.taus)  # the first sample with t >= tau
            self.ranges = (torch.zeros_like(first), first), (first, torch.full_like(first, len(self.t)))
        else:
            width = SMOOTHING * (domain[1] - domain[0])
            start = torch.searchsorted(self.t, self.taus - width)
            self.ranges = ((start, torch.searchsorted(self.t, self.taus + width, right=True)),) * 2

    def edges(self, weights: Tensor | None = None) -> tuple[float, float]:
        """Return (t1, t2) for samples with weights float64 (K,); None: all weights are 1.

        Raises:
            UserError: if alpha is never or always reached (the message has the range of the curve).
            OverlapError: if t1 is not below t2.
        """
        counts = torch.ones_like(self.t) if weights is None else weights[self.owner]
        total = _running_sums(counts)
        mean0, mean1 = (
            (sums[end] - sums[start]) / (total[end] - total[start])  # NaN for an empty range
            for sums, (start, end) in zip(
                (_running_sums(self.s0 * counts), _running_sums(self.s1 * counts)), self.ranges, strict=True
            )
        )
        if self.rule == "interval-mean":
            t1 = self._edge(mean0, mean0 >= self.alpha, "S0 over [t_min, tau)", last=True)
            t2 = self._edge(mean1, mean1 >= self.alpha, "S1 over [tau, t_max]", last=False)
        else:
            t1 = self._edge(mean0, mean0 < self.alpha, "smoothed S0", last=False)
            t2 = self._edge(mean1, mean1 < self.alpha, "smoothed S1", last=True)
        if not t1 < t2:
            raise OverlapError(
                f"stages: t1={t1:.4f} is not below t2={t2:.4f}: at alpha={self.alpha} the two outer stages overlap and "
                "leave no middle one"
            )
        return t1, t2

    def least_alpha(self) -> float | None:
        """Return the smallest alpha above the given one, in steps of 0.001, at which there are three stages, if any."""
        given = self.alpha
        try:
            for thousandths in range(math.floor(given * 1000) + 1, 1001):
                self.alpha = thousandths / 1000
                with contextlib.suppress(UserError):
                    self.edges()
                    return self.alpha
        finally:
            self.alpha = given
        return None

    def _edge(self, curve: Tensor, hit: Tensor, name: str, *, last: bool) -> float:
        """Return the first or last tau where `hit` is true.

        Raises UserError if there is none, or if it is at the end of the domain, because a stage would be empty.
        """
        outermost = -1 if last else 0
        if bool(torch.isnan(curve).any()):
            known = ~torch.isnan(curve)
            taus, curve, hit = self.taus[known], curve[known], hit[known]
        else:
            taus = self.taus
        if not bool(hit.any()) or bool(hit[outermost]):
            holds = bool(curve[outermost] >= self.alpha)
            raise UserError(
                f"stages: mean {name} {'holds' if holds else 'falls short of'} alpha={self.alpha} all the way to the end "
                f"of the domain (it runs from {float(curve.min()):.4f} to {float(curve.max()):.4f}); "
                + ("raise alpha or lower eta" if holds else "lower alpha or raise eta")
            )
        return float(taus[hit][outermost])


def _running_sums(values: Tensor) -> Tensor:
    """Return the sums of values[:i] for i = 0 .. n."""
    sums = values.new_zeros(len(values) + 1)
    torch.cumsum(values, 0, out=sums[1:])
    return sums


Partition = tuple[tuple[int, ...], float]


def optimal_partition(similarity: Array, stages: int, objective: Objective) -> Partition:
    """Divide M ordered nodes into optimal contiguous groups (Algorithm 2, step 9) by dynamic programming in O(n M²).

    Args:
        similarity: mean similarity of every pair of nodes, (M, M), symmetric.
        stages: the number n of groups, 1 <= n <= M.
        objective: "total-distance" minimises the sum of 1 - similarity over all ordered pairs inside groups (eq. 21).
            "mean-similarity" maximises the sum over groups of the mean similarity of their ordered pairs, including
            each node with itself (the published run).

    Returns:
        The index of the first node of each group except the first group (empty for n = 1), and the objective's value.

    Raises:
        UserError: if there are fewer nodes than groups.
    """
    return optimal_partitions(similarity, stages, objective)[-1]


def optimal_partitions(similarity: Array, stages: int, objective: Objective) -> list[Partition]:
    """Return `optimal_partition` for 1, 2, .. `stages` groups; one run of dynamic programming computes them all."""
    nodes = len(similarity)
    if not 1 <= stages <= nodes:
        raise UserError(f"stages: stages={stages} must be between 1 and the {nodes} nodes of the grid")
    found = cheapest_groups(_group_costs(similarity, objective), stages)
    return [(cuts, value if objective == "total-distance" else -value) for cuts, value in found]


def cheapest_groups(cost: Array, stages: int) -> list[Partition]:
    """Divide M ordered nodes into 1, 2, .. `stages` contiguous groups of least total cost.

    Args:
        cost: (M, M + 1); entry [i, j] is the cost of the group i..j-1, infinite if that group is not allowed.
        stages: the largest number of groups.

    Returns:
        For every number of groups, the index of the first node of each group except the first group, and the cost.
    """
    nodes = len(cost)
    best, choices, found = cost[0], [], []  # best[j]: least cost of nodes 0..j-1 in `groups` groups
    for groups in range(1, stages + 1):
        if groups > 1:
            candidates = best[:nodes, None] + cost
            choices.append(candidates.argmin(axis=0))
            best = candidates.min(axis=0)
        edges, end = [], nodes
        for choice in reversed(choices):
            end = int(choice[end])
            edges.append(end)
        found.append((tuple(reversed(edges)), float(best[nodes])))
    return found


def mean_within_distance(similarity: Array, cuts: tuple[int, ...]) -> float:
    """Return the mean of 1 - similarity over all ordered pairs of nodes in the same group, including (i, i)."""
    groups = [slice(a, b) for a, b in itertools.pairwise((0, *cuts, len(similarity)))]
    total = sum(float((1.0 - similarity[g, g]).sum()) for g in groups)
    return total / sum((g.stop - g.start) ** 2 for g in groups)


def _group_costs(similarity: Array, objective: Objective) -> Array:
    """Return an (M, M + 1) array whose entry [i, j] is the cost of the group i..j-1, infinite if it is empty."""
    nodes = len(similarity)
    values = 1.0 - similarity if objective == "total-distance" else -similarity
    prefix = np.zeros((nodes + 1, nodes + 1))
    prefix[1:, 1:] = values.cumsum(0).cumsum(1)
    corner = np.diag(prefix)
    cost = corner[None, :] - prefix[:nodes] - prefix[:, :nodes].T + corner[:nodes, None]
    length = np.arange(nodes + 1)[None, :] - np.arange(nodes)[:, None]
    if objective == "mean-similarity":
        cost = cost / np.maximum(length, 1) ** 2
    return np.where(length > 0, cost, np.inf)
