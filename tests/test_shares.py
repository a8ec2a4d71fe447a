"""What each stage gets of the training: allocation, shares, weights."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.shares import allocate, prior_masses, stage_shares, stage_weights, with_floor
from multistage_diffusion.stages import Stages

STAGES, PRIOR = Stages((0.2, 0.6)), LogNormal()


@pytest.mark.parametrize(
    ("batch", "shares", "counts"),
    [
        (12, (1 / 3, 1 / 3, 1 / 3), (4, 4, 4)),
        (128, (0.5, 0.35, 0.15), (64, 45, 19)),  # 64, 44.8, 19.2
        (10, (0.47, 0.35, 0.18), (5, 3, 2)),  # 4.7, 3.5, 1.8
        (10, (0.99, 0.01), (9, 1)),
        (3, (0.98, 0.01, 0.01), (1, 1, 1)),
        (8, (0.5, 0.0, 0.5), (4, 0, 4)),
        (7, (1.0,), (7,)),
    ],
)
def test_rows_are_allocated_by_largest_remainder(batch, shares, counts):
    assert allocate(batch, shares) == counts


def test_allocation_adds_up_and_is_the_nearest_there_is():
    rng = random.Random(0)
    for _ in range(200):
        raw = [rng.random() for _ in range(3)]
        shares, batch = [r / sum(raw) for r in raw], rng.randint(3, 40)
        counts = allocate(batch, shares)
        assert sum(counts) == batch
        assert min(counts) >= 1

        def distance(candidate, shares=shares, batch=batch):
            return sum((c - batch * s) ** 2 for c, s in zip(candidate, shares, strict=True))

        every = [c for c in itertools.product(range(1, batch + 1), repeat=2) if sum(c) < batch]
        best = min(distance((*c, batch - sum(c))) for c in every)
        assert distance(counts) == pytest.approx(best)


def test_a_batch_smaller_than_the_stages_is_refused():
    with pytest.raises(ValueError, match=r"training\.batch=2 is too small for 3 stages"):
        allocate(2, (0.5, 0.3, 0.2))


def test_prior_masses_are_those_of_many_draws():
    draws = torch.exp(-1.2 + 1.2 * torch.randn(400_000, generator=torch.Generator().manual_seed(0)))
    found = torch.bincount(STAGES.index(draws)) / len(draws)
    assert prior_masses(STAGES, PRIOR) == pytest.approx(found.tolist(), abs=3e-3)
    assert sum(prior_masses(STAGES, PRIOR)) == pytest.approx(1)


def test_shares_and_weights_add_up_to_one():
    masses = pytest.approx(prior_masses(STAGES, PRIOR))
    given = TrainingConfig(shares=(2.0, 1.0, 1.0), weights=(1.0, 3.0, 0.0))
    assert stage_shares(given, STAGES, PRIOR) == (0.5, 0.25, 0.25)
    assert stage_weights(given, STAGES, PRIOR) == (0.25, 0.75, 0.0)
    assert stage_shares(TrainingConfig(shares="uniform"), STAGES, PRIOR) == pytest.approx((1 / 3,) * 3)
    assert stage_shares(TrainingConfig(shares="prior"), STAGES, PRIOR) == masses
    assert stage_weights(TrainingConfig(weights="prior"), STAGES, PRIOR) == masses
    follow = TrainingConfig(weights="shares", shares=(2.0, 1.0, 1.0))
    assert stage_weights(follow, STAGES, PRIOR) == (0.5, 0.25, 0.25)


@pytest.mark.parametrize(
    ("shares", "floor", "expected"),
    [
        ((0.96, 0.035, 0.005), 0.0, (0.96, 0.035, 0.005)),
        ((0.96, 0.035, 0.005), 0.05, (0.9, 0.05, 0.05)),
        ((0.6, 0.39, 0.01), 0.1, (0.6 * 0.9 / 0.99, 0.39 * 0.9 / 0.99, 0.1)),
        ((0.62, 0.105, 0.275, 0.0), 0.1, (0.62, 0.105, 0.275, 0.0)),  # a stage without rows stays so
        ((0.849, 0.101, 0.05), 0.1, (0.8, 0.1, 0.1)),  # what is scaled may fall below the floor in turn
        ((0.5, 0.3, 0.2), 1 / 3, (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_no_stage_falls_below_the_floor(shares, floor, expected):
    found = with_floor(shares, floor)
    assert found == pytest.approx(expected, rel=1e-3)
    assert sum(found) == pytest.approx(1)
    assert min(share for share in found if share) >= min(floor, 1) * (1 - 1e-12)


def test_the_floor_holds_for_the_density_s_shares_and_not_above_an_equal_share():
    floored = TrainingConfig(shares="prior", floor_share=0.3)
    assert min(stage_shares(floored, STAGES, PRIOR)) == pytest.approx(0.3)
    assert stage_weights(floored, STAGES, PRIOR) == pytest.approx(prior_masses(STAGES, PRIOR))  # the loss is the same
    with pytest.raises(
        ValueError, match=r"training\.floor_share=0\.4: 3 stages cannot have so much each; .* at most 0\.333"
    ):
        stage_shares(TrainingConfig(floor_share=0.4), STAGES, PRIOR)
    with pytest.raises(ValueError, match=r"training\.floor_share=-0\.1 must be in"):
        TrainingConfig(floor_share=-0.1)
