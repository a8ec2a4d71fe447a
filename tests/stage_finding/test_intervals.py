import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from multistage_diffusion.errors import UserError
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding.boundaries import ThreeStages
from multistage_diffusion.stage_finding.intervals import RESAMPLES, edge_intervals, half_width
from multistage_diffusion.stage_finding.posterior import TiledImages
from multistage_diffusion.stage_finding.similarity import Similarities, sample_similarities

DOMAIN = (1e-3, 1.0)


def test_the_interval_of_a_mean_is_the_normal_one():
    values = 0.5 + 0.1 * np.random.default_rng(0).standard_normal((500, 20)) * np.linspace(1, 3, 20)

    def means(weights):
        assert weights.shape == (500,)
        assert weights.sum() == 500
        return tuple(weights @ values / 500)

    found = np.array(edge_intervals(means, 500, (-9, 9), seed=1, count=20))
    error = values.std(0) / math.sqrt(500)
    ends = (found - values.mean(0)[:, None]) / error[:, None]
    # the 2.5 % quantile of 400 draws has a standard error of 0.13 of theirs
    assert np.abs(ends - (-1.96, 1.96)).max() < 0.5
    assert ends.mean(0) == pytest.approx([-1.96, 1.96], abs=0.1)


def test_the_seed_decides_the_resamples():
    values = np.random.default_rng(0).standard_normal(100)
    found = [edge_intervals(lambda w: (w @ values / 100,), 100, (-9, 9), seed=seed, count=1) for seed in (0, 0, 1)]
    assert found[0] == found[1]
    assert found[0] != found[2]


@pytest.mark.parametrize(("lost", "wide"), [(4, False), (30, True)])
def test_resamples_without_edges_reach_to_the_ends_of_the_domain(lost, wide):
    calls = iter(range(RESAMPLES))

    def read(weights):
        if next(calls) < lost:
            raise UserError("no edge")
        return 0.4, 0.6

    found = edge_intervals(read, 100, DOMAIN, seed=0, count=2)
    assert found == ([DOMAIN, DOMAIN] if wide else [(0.4, 0.4), (0.6, 0.6)])


def test_other_errors_are_not_taken_for_lost_edges():
    def read(weights):
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        edge_intervals(read, 100, DOMAIN, seed=0, count=2)


def test_one_stage_has_no_edges_to_be_sure_of():
    assert edge_intervals(lambda weights: (), 100, DOMAIN, seed=0, count=0) == []
    assert half_width([]) == 0


def test_half_width_is_that_of_the_widest():
    assert half_width([(0.1, 0.2), (0.3, 0.9), (0.5, 0.6)]) == pytest.approx(0.3)


@pytest.fixture(scope="module")
def digits() -> TiledImages:
    return TiledImages(np.round(load_digits().images / 16 * 255).astype(np.uint8))


@pytest.fixture(scope="module")
def draw(digits):
    options = {"eta": 2 / 256, "space": "eps", "measure": VP()}
    return lambda samples, **changes: sample_similarities(digits, range(samples), **options, **changes)


@pytest.fixture(scope="module")
def many(draw) -> Similarities:
    return draw(20_000, times=4, seed=10**6)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["interval-mean", "pointwise"])
def test_intervals_hold_the_edges_of_many_samples_as_often_as_they_say(draw, many, rule):
    options = {"alpha": 0.9, "rule": rule, "grid": 1000, "domain": DOMAIN}
    truth, held = ThreeStages(many, **options).edges(), np.zeros(2, int)
    for seed in range(20):
        few = ThreeStages(draw(150, times=16, seed=seed), **options)
        found = edge_intervals(lambda w, few=few: few.edges(torch.from_numpy(w)), 150, DOMAIN, seed=seed, count=2)
        held += [low <= edge <= high for (low, high), edge in zip(found, truth, strict=True)]
        assert half_width(found) < 0.05
    assert held.min() >= 17, held
