import itertools

import numpy as np
import pytest
import torch

from multistage_diffusion.stage_finding.boundaries import (
    ThreeStages,
    cheapest_groups,
    mean_within_distance,
    optimal_partition,
    optimal_partitions,
)
from multistage_diffusion.stage_finding.similarity import Similarities

OBJECTIVES = ("total-distance", "mean-similarity")
RULES = ("interval-mean", "pointwise")


def curves(s0, s1, count: int = 20_000, times: int = 1) -> Similarities:
    """Return the similarities at evenly spaced times, shuffled: (count / times, times)."""
    t = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    t = t[torch.randperm(count, generator=torch.Generator().manual_seed(0))].view(-1, times)
    return Similarities(t, s0(t), s1(t))


def reader(sampled: Similarities, rule: str, alpha: float = 0.9) -> ThreeStages:
    return ThreeStages(sampled, alpha=alpha, rule=rule, grid=10_000, domain=(1e-3, 1.0))


def bathtub(times: int = 1) -> Similarities:
    """S0 falls 1 -> 0 over [0.2, 0.4] and rises again from 0.8; S1 rises over [0.5, 0.7]."""
    return curves(
        lambda t: (1 - (t - 0.2) / 0.2).clamp(0, 1) + ((t - 0.8) / 0.2).clamp(0, 1),
        lambda t: ((t - 0.5) / 0.2).clamp(0, 1),
        times=times,
    )


@pytest.mark.parametrize("times", [1, 32])
def test_interval_mean_has_the_closed_form(times):
    # mean S0 over [0, tau) is 0.9 where (tau - 0.2)²/0.4 = 0.1 tau; mirrored for S1
    t1, t2 = reader(bathtub(times), "interval-mean").edges()
    u = (0.04 + np.sqrt(0.04**2 + 4 * 0.008)) / 2
    v = (0.04 + np.sqrt(0.04**2 + 4 * 0.04 * 0.3)) / 2
    assert t1 == pytest.approx(0.2 + u, abs=2e-4)
    assert t2 == pytest.approx(0.7 - v, abs=2e-4)


def test_interval_mean_takes_the_outermost_times():
    sampled = curves(
        lambda t: 1.0 - ((t > 0.1) & (t < 0.12)).double() * 1.0 - (t > 0.5).double(),
        lambda t: 1.0 - ((t > 0.88) & (t < 0.9)).double() * 1.0 - (t < 0.6).double(),
    )
    t1, t2 = reader(sampled, "interval-mean", alpha=0.95).edges()
    assert t1 == pytest.approx(0.48 / 0.95, abs=2e-4)  # not 0.105, where the mean first falls below alpha
    assert t2 == pytest.approx(1 - 0.38 / 0.95, abs=2e-4)


@pytest.mark.parametrize("times", [1, 32])
def test_pointwise_stops_at_the_first_fall_of_s0_and_the_last_of_s1(times):
    t1, t2 = reader(bathtub(times), "pointwise").edges()
    assert t1 == pytest.approx(0.22, abs=3e-4)
    assert t2 == pytest.approx(0.68, abs=3e-4)


def noisy(samples: int, times: int) -> Similarities:
    """Return samples that differ: each falls and rises at times of its own."""
    generator = torch.Generator().manual_seed(1)
    start, fall, rise = torch.rand(3, samples, 1, dtype=torch.float64, generator=generator)
    t = 1e-3 + 0.999 * (torch.arange(times, dtype=torch.float64) + start) / times
    return Similarities(t, (t < 0.1 + 0.3 * fall).double(), (t > 0.5 + 0.3 * rise).double())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("times", [1, 7])
def test_a_weight_counts_a_sample_so_many_times(rule, times):
    sampled = noisy(1500, times)
    weights = torch.randint(0, 4, (1500,), generator=torch.Generator().manual_seed(2))
    repeated = Similarities(*(values.repeat_interleave(weights, dim=0) for values in sampled))
    weighted = reader(sampled, rule).edges(weights.double())
    assert weighted == reader(repeated, rule).edges()
    assert weighted == reader(sampled, rule).edges(2.5 * weights.double())
    assert weighted != reader(sampled, rule).edges()
    assert reader(sampled, rule).edges(torch.ones(1500, dtype=torch.float64)) == reader(sampled, rule).edges()


@pytest.mark.parametrize("rule", RULES)
def test_edges_equal_the_rules_read_literally(rule):
    sampled = noisy(300, 3)
    weights = torch.randint(0, 3, (300,), generator=torch.Generator().manual_seed(3)).double()
    found = ThreeStages(sampled, alpha=0.8, rule=rule, grid=200, domain=(1e-3, 1.0)).edges(weights)
    t, s0, s1 = (values.numpy() for values in sampled)
    w = np.broadcast_to(weights.numpy()[:, None], t.shape)

    def mean(values, where):
        return (values * w)[where].sum() / w[where].sum()

    taus = [k / 200 for k in range(1, 200)]
    if rule == "interval-mean":
        t1 = max(tau for tau in taus if mean(s0, t < tau) >= 0.8)
        t2 = min(tau for tau in taus if mean(s1, t >= tau) >= 0.8)
    else:
        t1 = min(tau for tau in taus if mean(s0, np.abs(t - tau) <= 0.00999) < 0.8)
        t2 = max(tau for tau in taus if mean(s1, np.abs(t - tau) <= 0.00999) < 0.8)
    assert found == pytest.approx((t1, t2), abs=1e-12)


def test_times_without_samples_are_passed_over():
    t = torch.tensor([[0.3], [0.35], [0.5], [0.9], [0.95]], dtype=torch.float64)
    sampled = Similarities(t, (t < 0.4).double(), (t > 0.8).double())
    t1, t2 = ThreeStages(sampled, alpha=0.99, rule="interval-mean", grid=1000, domain=(1e-3, 1.0)).edges()
    assert (t1, t2) == (0.5, 0.501)  # the first tau after a sample that spoils the mean is too late
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)  # nothing left in the middle
    with pytest.raises(ValueError, match=r"t1=0.9000 is not below t2=0.3501"):
        reader(sampled, "interval-mean", 0.99).edges(weights)


@pytest.mark.parametrize("rule", RULES)
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
        reader(sampled, rule).edges()


@pytest.mark.parametrize("rule", RULES)
def test_overlapping_outer_stages_are_refused(rule):
    sampled = curves(lambda t: (t < 0.6).double(), lambda t: (t > 0.4).double(), count=2000)
    with pytest.raises(ValueError, match="is not below t2"):
        reader(sampled, rule).edges()


def value_of(similarity: np.ndarray, cuts: tuple[int, ...], objective: str) -> float:
    groups = [similarity[a:b, a:b] for a, b in itertools.pairwise((0, *cuts, len(similarity)))]
    return sum((1 - g).sum() if objective == "total-distance" else g.mean() for g in groups)


def exhaustive(similarity: np.ndarray, stages: int, objective: str) -> float:
    values = [
        value_of(similarity, cuts, objective) for cuts in itertools.combinations(range(1, len(similarity)), stages - 1)
    ]
    return min(values) if objective == "total-distance" else max(values)


def random_similarity(nodes: int, seed: int) -> np.ndarray:
    half = np.random.default_rng(seed).random((nodes, nodes))
    similarity = (half + half.T) / 2
    np.fill_diagonal(similarity, 1.0)
    return similarity


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("nodes", range(1, 11))
def test_partitions_equal_exhaustive_search(nodes, objective):
    for seed in range(3):
        similarity = random_similarity(nodes, seed)
        found = optimal_partitions(similarity, nodes, objective)
        assert [len(cuts) for cuts, _ in found] == list(range(nodes))
        for stages, (cuts, value) in enumerate(found, start=1):
            assert all(a < b for a, b in itertools.pairwise((0, *cuts, nodes)))
            assert value == pytest.approx(exhaustive(similarity, stages, objective), abs=1e-12)
            assert value == pytest.approx(value_of(similarity, cuts, objective), abs=1e-12)
            assert optimal_partition(similarity, stages, objective) == (cuts, value)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_blocks_are_found(objective):
    similarity = np.full((12, 12), 0.1)
    for a, b in ((0, 3), (3, 8), (8, 12)):
        similarity[a:b, a:b] = 1.0
    assert optimal_partition(similarity, 3, objective)[0] == (3, 8)
    assert optimal_partition(similarity, 1, objective)[0] == ()


@pytest.mark.parametrize("stages", [0, 5])
def test_impossible_numbers_of_stages_are_refused(stages):
    for search in (optimal_partition, optimal_partitions):
        with pytest.raises(ValueError, match=f"stages={stages} must be between 1 and the 4 nodes"):
            search(np.eye(4), stages, "total-distance")


def test_cheapest_groups_never_take_one_that_is_not_allowed():
    cost = np.where(np.arange(7)[None, :] > np.arange(6)[:, None], 1.0, np.inf)
    cost[:, 6] = np.where(np.arange(6) < 4, np.inf, 1.0)  # the last group must start at node 4 or 5
    assert [value for _, value in cheapest_groups(cost, 3)] == [np.inf, 2.0, 3.0]
    assert cheapest_groups(cost, 3)[1][0] in ((4,), (5,))
    cost[2:, :6] = np.inf  # so the groups before it start at 0 or 1
    assert cheapest_groups(cost, 3)[2][0] in ((1, 4), (1, 5))


def test_mean_within_distance_equals_the_loop():
    similarity = random_similarity(9, 0)
    for cuts in ((), (4,), (1, 8), (2, 3, 7), tuple(range(1, 9))):
        group = [sum(node >= cut for cut in cuts) for node in range(9)]
        pairs = [1 - similarity[a, b] for a in range(9) for b in range(9) if group[a] == group[b]]
        assert mean_within_distance(similarity, cuts) == pytest.approx(np.mean(pairs), abs=1e-12)
