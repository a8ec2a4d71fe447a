"""From similarities to the times at which one stage ends and the next begins."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .similarity import Similarities

Rule = Literal["interval-mean", "pointwise"]
Objective = Literal["total-distance", "mean-similarity"]
Array = npt.NDArray[np.float64]

# Half-width of the moving average of rule "pointwise", as a share of the time domain.
SMOOTHING = 0.01


def three_stage_edges(
    curves: Similarities, *, alpha: float, rule: Rule, grid: int, domain: tuple[float, float]
) -> tuple[float, float]:
    """Return (t1, t2) of Algorithm 1.

    Rule "interval-mean": t1 is the largest tau whose mean S0 over {t_k < tau} is at least alpha, t2 the smallest tau
    whose mean S1 over {t_k >= tau} is. Rule "pointwise": S0 and S1 are smoothed by a moving average over
    |t_k - tau| <= 1 % of the domain (shorter at its ends); t1 is the first tau at which S0 lies below alpha, t2 the
    last tau at which S1 does. (S0 rises again towards the noisy end, so the order matters.)

    Args:
        curves: Algorithm 1's samples.
        alpha: the similarity asked for, in (0, 1].
        rule: as above.
        grid: tau runs over the multiples of t_max / grid inside the domain.
        domain: (t_min, t_max) of the sampled times.

    Raises:
        ValueError: if alpha is never or always reached or the edges come out in the wrong order, with the range of the
            curve.
    """
    taus = torch.arange(1, grid, dtype=torch.float64) * domain[1] / grid
    taus = taus[taus > domain[0]]
    order = curves.t.argsort()
    t, s0, s1 = curves.t[order], curves.s0[order], curves.s1[order]
    if rule == "interval-mean":
        first = torch.searchsorted(t, taus)  # the first sample with t_k >= tau
        start, end = torch.zeros_like(first), torch.full_like(first, len(t))
        below, above = _range_means(s0, start, first), _range_means(s1, first, end)
        t1 = _edge(taus, below, below >= alpha, "S0 over [t_min, tau)", alpha, last=True)
        t2 = _edge(taus, above, above >= alpha, "S1 over [tau, t_max]", alpha, last=False)
    else:
        width = SMOOTHING * (domain[1] - domain[0])
        start, end = torch.searchsorted(t, taus - width), torch.searchsorted(t, taus + width, right=True)
        near0, near1 = _range_means(s0, start, end), _range_means(s1, start, end)
        t1 = _edge(taus, near0, near0 < alpha, "smoothed S0", alpha, last=False)
        t2 = _edge(taus, near1, near1 < alpha, "smoothed S1", alpha, last=True)
    if not t1 < t2:
        raise ValueError(
            f"split: t1={t1:.4f} is not below t2={t2:.4f}: at alpha={alpha} the two outer stages overlap and leave no "
            "middle one; raise alpha, lower eta, or ask for 2 stages with algorithm 2"
        )
    return t1, t2


def _range_means(values: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Return the means of values[start:end], NaN where empty."""
    sums = torch.cat((values.new_zeros(1), values.cumsum(0)))
    return (sums[end] - sums[start]) / (end - start)


def _edge(taus: Tensor, curve: Tensor, hit: Tensor, name: str, alpha: float, *, last: bool) -> float:
    """Return the first or last tau that is hit; refuse one at the end of the domain, where no stage would be left."""
    known = ~torch.isnan(curve)
    taus, curve, hit = taus[known], curve[known], hit[known]
    outermost = -1 if last else 0
    if not bool(hit.any()) or bool(hit[outermost]):
        holds = bool(curve[outermost] >= alpha)
        raise ValueError(
            f"split: mean {name} {'holds' if holds else 'falls short of'} alpha={alpha} all the way to the end of the "
            f"domain (it runs from {float(curve.min()):.4f} to {float(curve.max()):.4f}); "
            + ("raise alpha or lower eta" if holds else "lower alpha or raise eta")
        )
    return float(taus[hit][outermost])


def optimal_partition(similarity: Array, stages: int, objective: Objective) -> tuple[tuple[int, ...], float]:
    """Cut M ordered nodes into contiguous groups, optimally (Algorithm 2, step 9), by dynamic programming in O(n M²).

    Args:
        similarity: mean similarity of every pair of nodes, (M, M), symmetric.
        stages: the number n of groups, 1 <= n <= M.
        objective: "total-distance": least sum of 1 - similarity over all ordered pairs inside groups (eq. 21);
            "mean-similarity": greatest sum over groups of the mean similarity of their ordered pairs, each node with
            itself included (the published run).

    Returns:
        The first node of each group but the first (empty for n = 1), and the objective's value.

    Raises:
        ValueError: if there are fewer nodes than groups.
    """
    nodes = len(similarity)
    if not 1 <= stages <= nodes:
        raise ValueError(f"split: stages={stages} must be between 1 and the {nodes} nodes of the grid")
    cost = _group_costs(similarity, objective)
    best = cost[0]  # best[j]: least cost of cutting nodes 0..j-1 into the groups so far
    choices = []
    for _ in range(1, stages):
        candidates = best[:nodes, None] + cost
        choices.append(candidates.argmin(axis=0))
        best = candidates.min(axis=0)
    edges = []
    end = nodes
    for choice in reversed(choices):
        end = int(choice[end])
        edges.append(end)
    value = float(best[nodes])
    return tuple(reversed(edges)), value if objective == "total-distance" else -value


def _group_costs(similarity: Array, objective: Objective) -> Array:
    """Return the cost of every group i..j-1 as entry [i, j] of an (M, M + 1) array, infinite where it is empty."""
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
