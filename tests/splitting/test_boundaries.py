import itertools

import numpy as np
import pytest
import torch

from multistage_diffusion.splitting.boundaries import optimal_partition, three_stage_edges
from multistage_diffusion.splitting.similarity import Similarities

OBJECTIVES = ("total-distance", "mean-similarity")


def curves(s0, s1, count: int = 20_000) -> Similarities:
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = t[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return Similarities(t, s0(t), s1(t))


def edges(sampled: Similarities, rule: str, alpha: float = 0.9) -> tuple[float, float]:
    return three_stage_edges(sampled, alpha=alpha, rule=rule, grid=10_000, domain=(1e-3, 1.0))


def bathtub() -> Similarities:
    """S0 falls 1 -> 0 over [0.2, 0.4] and rises again from 0.8; S1 rises over [0.5, 0.7]."""
    return curves(
        lambda t: (1 - (t - 0.2) / 0.2).clamp(0, 1) + ((t - 0.8) / 0.2).clamp(0, 1),
        lambda t: ((t - 0.5) / 0.2).clamp(0, 1),
    )


def test_interval_mean_has_the_closed_form():
    # mean S0 over [0, tau) is 0.9 where (tau - 0.2)²/0.4 = 0.1 tau; mirrored for S1
    t1, t2 = edges(bathtub(), "interval-mean")
    u = (0.04 + np.sqrt(0.04**2 + 4 * 0.008)) / 2
    v = (0.04 + np.sqrt(0.04**2 + 4 * 0.04 * 0.3)) / 2
    assert t1 == pytest.approx(0.2 + u, abs=2e-4)
    assert t2 == pytest.approx(0.7 - v, abs=2e-4)


def test_interval_mean_takes_the_outermost_times():
    sampled = curves(
        lambda t: 1.0 - ((t > 0.1) & (t < 0.12)).double() * 1.0 - (t > 0.5).double(),
        lambda t: 1.0 - ((t > 0.88) & (t < 0.9)).double() * 1.0 - (t < 0.6).double(),
    )
    t1, t2 = edges(sampled, "interval-mean", alpha=0.95)
    assert t1 == pytest.approx(0.48 / 0.95, abs=2e-4)  # not 0.105, where the mean first falls below alpha
    assert t2 == pytest.approx(1 - 0.38 / 0.95, abs=2e-4)


def test_pointwise_stops_at_the_first_fall_of_s0_and_the_last_of_s1():
    t1, t2 = edges(bathtub(), "pointwise")
    assert t1 == pytest.approx(0.22, abs=3e-4)
    assert t2 == pytest.approx(0.68, abs=3e-4)


@pytest.mark.parametrize("rule", ["interval-mean", "pointwise"])
@pytest.mark.parametrize(
    ("s0", "s1", "message"),
    [
        (0.4, 1.0, r"S0.* falls short of alpha=0.9 .*from 0.4000 to 0.4000.*lower alpha"),
        (1.0, 1.0, r"S0.* holds alpha=0.9 .*from 1.0000 to 1.0000.*raise alpha"),
        (None, 0.3, r"S1.* falls short of alpha=0.9 .*from 0.3000 to 0.3000.*lower alpha"),
        (None, 1.0, r"S1.* holds alpha=0.9 .*raise alpha"),
    ],
)
def test_no_edge_is_invented(rule, s0, s1, message):
    def falling(t):
        return (t < 0.3).double()

    def constant(value):
        return lambda t: torch.full_like(t, value)

    sampled = curves(falling if s0 is None else constant(s0), constant(s1), count=2000)
    with pytest.raises(ValueError, match=message):
        edges(sampled, rule)


@pytest.mark.parametrize("rule", ["interval-mean", "pointwise"])
def test_overlapping_outer_stages_are_refused(rule):
    sampled = curves(lambda t: (t < 0.6).double(), lambda t: (t > 0.4).double(), count=2000)
    with pytest.raises(ValueError, match="is not below t2"):
        edges(sampled, rule)


def exhaustive(similarity: np.ndarray, stages: int, objective: str) -> float:
    values = []
    for cuts in itertools.combinations(range(1, len(similarity)), stages - 1):
        groups = [similarity[a:b, a:b] for a, b in itertools.pairwise((0, *cuts, len(similarity)))]
        values.append(sum((1 - g).sum() if objective == "total-distance" else g.mean() for g in groups))
    return min(values) if objective == "total-distance" else max(values)


def value_of(similarity: np.ndarray, cuts: tuple[int, ...], objective: str) -> float:
    groups = [similarity[a:b, a:b] for a, b in itertools.pairwise((0, *cuts, len(similarity)))]
    return sum((1 - g).sum() if objective == "total-distance" else g.mean() for g in groups)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("nodes", range(1, 11))
def test_partition_equals_exhaustive_search(nodes, objective):
    generator = np.random.default_rng(nodes)
    for stages in range(1, min(nodes, 5) + 1):
        for _ in range(3):
            half = generator.random((nodes, nodes))
            similarity = (half + half.T) / 2
            np.fill_diagonal(similarity, 1.0)
            cuts, value = optimal_partition(similarity, stages, objective)
            assert len(cuts) == stages - 1
            assert all(a < b for a, b in itertools.pairwise((0, *cuts, nodes)))
            assert value == pytest.approx(exhaustive(similarity, stages, objective), abs=1e-12)
            assert value == pytest.approx(value_of(similarity, cuts, objective), abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_blocks_are_found(objective):
    similarity = np.full((12, 12), 0.1)
    for a, b in ((0, 3), (3, 8), (8, 12)):
        similarity[a:b, a:b] = 1.0
    assert optimal_partition(similarity, 3, objective)[0] == (3, 8)
    assert optimal_partition(similarity, 1, objective)[0] == ()


@pytest.mark.parametrize("stages", [0, 5])
def test_impossible_numbers_of_stages_are_refused(stages):
    with pytest.raises(ValueError, match=f"stages={stages} must be between 1 and the 4 nodes"):
        optimal_partition(np.eye(4), stages, "total-distance")
