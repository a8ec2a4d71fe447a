from __future__ import annotations

import numpy as np
import pytest

from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.training.updates import updates

COUNTS, SHARES, WEIGHTS = (6, 3, 3), (0.5, 0.25, 0.25), (0.2, 0.2, 0.6)


def test_a_mixed_step_trains_all_rows():
    assert list(updates(TrainingConfig(), 7, COUNTS, SHARES, WEIGHTS)) == [(COUNTS, WEIGHTS)]


def test_sequential_steps_see_the_rows_of_the_mixed_step():
    training = TrainingConfig(update_mode="sequential")
    found = list(updates(training, 0, (6, 0, 3), SHARES, WEIGHTS))
    assert found == [((6, 0, 0), WEIGHTS), ((0, 0, 3), WEIGHTS)]
    assert [counts for counts, _ in updates(training, 0, COUNTS, SHARES, WEIGHTS)] == [(6, 0, 0), (0, 3, 0), (0, 0, 3)]


def test_one_stage_mode_draws_stages_by_share_and_weighs_them_back():
    training, drawn = TrainingConfig(update_mode="one-stage"), []
    for step in range(2000):
        ((counts, weights),) = updates(training, step, (12, 12, 12), (0.6, 0.3, 0.1), WEIGHTS)
        (stage,) = (k for k in range(3) if counts[k])
        assert counts[stage] == 12
        assert weights[stage] == pytest.approx((0.2 / 0.6, 0.2 / 0.3, 6.0)[stage])
        drawn.append(stage)
    assert (np.bincount(drawn) / 2000).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.035)
