from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding import StageResult, StageSettings, compute_stages
from multistage_diffusion.stage_finding.baselines import baseline_partition, centred_groups

# the paper's rule at M = 200: the first time of each next group
SNR = {2: (0.57,), 3: (0.35, 0.71), 4: (0.23, 0.525, 0.78), 5: (0.16, 0.405, 0.635, 0.83)}
TIMESTEP = {2: (0.5,), 3: (0.335, 0.67), 4: (0.25, 0.495, 0.75), 5: (0.205, 0.41, 0.605, 0.8)}


def cost(values, cuts: tuple[int, ...], stages: int) -> float:
    """The rule as printed: infinite where a group is too short or too long."""
    count, total = len(values), 0.0
    for a, b in itertools.pairwise((0, *cuts, count)):
        group = [float(v) for v in values[a:b]]
        if not math.floor(count / (2 * stages)) <= len(group) <= math.ceil(3 * count / (2 * stages)):
            return math.inf
        total += sum(abs(v - group[len(group) // 2]) for v in group)
    return total


def cuts_of(edges: tuple[float, ...], times: int = 200) -> tuple[int, ...]:
    """Positions, from 0, of the times i / M, i = 1..M."""
    return tuple(round(edge * times) - 1 for edge in edges)


@pytest.mark.parametrize("stages", SNR)
def test_snr_edges_are_the_papers(stages):
    edges, curves = baseline_partition("snr", stages)
    assert edges == SNR[stages]
    # log-SNR written out
    values = [-math.log(math.expm1((9.95 * t + 0.1) * t)) for t in np.arange(1, 201) / 200]
    assert curves["t"] == pytest.approx(np.arange(1, 201) / 200)
    assert curves["value"] == pytest.approx(values, abs=1e-6)
    assert curves["objective_value"] == pytest.approx(cost(values, cuts_of(edges), stages), rel=1e-12)


@pytest.mark.parametrize("stages", TIMESTEP)
def test_timestep_edges_cost_what_the_papers_do(stages):
    edges, curves = baseline_partition("timestep", stages)
    times = np.arange(1, 201) / 200
    assert curves["value"] == curves["t"] == pytest.approx(times)
    assert curves["objective_value"] == pytest.approx(cost(times, cuts_of(TIMESTEP[stages]), stages), rel=1e-12)
    assert curves["objective_value"] == pytest.approx(cost(times, cuts_of(edges), stages), rel=1e-12)
    assert np.abs(np.subtract(edges, TIMESTEP[stages])).max() <= 0.02  # ties range over up to four grid steps
    if stages < 5:
        assert edges == TIMESTEP[stages]


def test_one_stage_has_no_edges():
    edges, curves = baseline_partition("timestep", 1)
    assert edges == ()
    assert curves["objective_value"] == pytest.approx(sum(abs(i - 101) for i in range(1, 201)) / 200)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("count", range(1, 12))
def test_groups_equal_exhaustive_search(count, sign):
    generator = np.random.default_rng(count)
    for stages in range(1, min(count, 5) + 1):
        for _ in range(3):
            values = sign * np.sort(generator.normal(size=count))
            found, total = centred_groups(values, stages)
            every = itertools.combinations(range(1, count), stages - 1)
            assert total == pytest.approx(min(cost(values, cuts, stages) for cuts in every), abs=1e-12)
            assert total == pytest.approx(cost(values, found, stages), abs=1e-12)


def test_groups_keep_to_their_sizes():
    # of 8 values in 2 groups, none holds fewer than 8 / 4 or more than 3 * 8 / 4
    six, seven = np.repeat([0.0, 100.0], (6, 2)), np.repeat([0.0, 100.0], (7, 1))
    assert centred_groups(six, 2) == ((6,), 0.0)
    assert centred_groups(seven, 2)[1] == 100.0
    # of 12 in 3 groups, none holds fewer than 12 / 6
    assert centred_groups(np.repeat([0.0, 50.0, 1000.0], (5, 5, 2)), 3) == ((5, 10), 0.0)
    assert centred_groups(np.repeat([0.0, 50.0, 1000.0], (5, 6, 1)), 3)[1] == 950.0
    # and none is empty
    assert centred_groups(np.zeros(4), 3) == ((1, 2), 0.0)


def test_of_equal_cuts_the_last_groups_are_longest():
    # n whole numbers cost n² // 4: 2 + 3 of them as much as 3 + 2, and 3 + 4 as 4 + 3
    assert centred_groups(np.arange(5.0), 2) == ((2,), 1.0 + 2.0)
    assert centred_groups(np.arange(7.0), 2) == ((3,), 2.0 + 4.0)


def test_another_kernel_gives_its_own_times():
    edges, curves = baseline_partition("timestep", 4, measure=VP(t_max=2.0), times=40)
    assert edges == tuple(2 * edge for edge in baseline_partition("timestep", 4, times=40)[0])
    assert curves["objective_value"] == pytest.approx(
        2 * baseline_partition("timestep", 4, times=40)[1]["objective_value"]
    )
    measure = VP(beta_d=4.0, beta_min=1.0)
    edges, curves = baseline_partition("snr", 3, measure=measure, times=50)
    values = measure.log_snr(torch.arange(1, 51, dtype=torch.float64) / 50)
    assert curves["value"] == pytest.approx(values.tolist(), abs=1e-6)
    assert cost(values, cuts_of(edges, 50), 3) == pytest.approx(curves["objective_value"])
    assert edges != baseline_partition("snr", 3, times=50)[0]


@pytest.mark.parametrize("algorithm", ["timestep", "snr"])
@pytest.mark.parametrize("stages", [0, 21])
def test_impossible_numbers_of_stages_are_refused(algorithm, stages):
    with pytest.raises(ValueError, match=f"stages={stages} must be between 1 and the 20 times"):
        baseline_partition(algorithm, stages, times=20)


@pytest.mark.parametrize("algorithm", ["timestep", "snr"])
def test_a_baseline_is_a_split_like_any_other(algorithm, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    result = compute_stages(images, StageSettings(algorithm=algorithm, stages=4), fingerprint="of the images")
    assert (result.edges_t, result.curves) == baseline_partition(algorithm, 4)
    assert result.edges_sigma == tuple(VP().edge_sigma(t) for t in result.edges_t)
    assert (result.intervals_t, result.samples, result.rule, result.fingerprint) == ((), 0, algorithm, "of the images")
    assert result.strip
    assert result.stages().interior == result.edges_sigma
    result.save(tmp_path / "stages.json")
    assert StageResult.load(tmp_path / "stages.json") == result
    steps = compute_stages(images, StageSettings(algorithm=algorithm, stages=2), schedule=Discrete())
    assert all(t.is_integer() for t in steps.edges_t)


def test_gradients_are_not_found_in_images():
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    with pytest.raises(ValueError, match="algorithm=gradient reads a trained run"):
        compute_stages(images, StageSettings(algorithm="gradient"))
