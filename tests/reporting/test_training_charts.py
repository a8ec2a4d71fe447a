"""Charts of a training; those of a whole report are tested with it."""

from __future__ import annotations

import math

from multistage_diffusion.reporting.training_charts import (
    POINTS,
    _curve,
    evaluation_charts,
    training_charts,
    training_seconds,
)


def test_curves_are_thinned_by_averaging() -> None:
    records = [{"images": i, "loss": [float(i % 2), None, math.nan]} for i in range(2 * POINTS)]
    x, y = _curve(records, lambda r: r["loss"][0])
    assert len(x) == POINTS
    assert x[:2] == [0.5, 2.5]
    assert set(y) == {0.5}
    assert _curve(records, lambda r: r["loss"][1]) == ([], [])
    assert _curve(records, lambda r: r["loss"][2]) == ([], [])


def test_what_was_not_logged_is_said() -> None:
    assert "No training was logged." in training_charts([], [], 3)
    assert evaluation_charts([]) == ""
    assert "No samples could be evaluated" in evaluation_charts([{"frechet": None}])


def test_the_time_that_a_stop_left_unlogged_counts() -> None:
    lines = [
        {"images": 100, "seconds": 10.0, "images_per_s": 10.0},
        {"images": 200, "seconds": 2.0, "images_per_s": 5.0},  # of a resumed run: its first steps were not logged
    ]
    assert training_seconds(lines) == 10.0 + 20.0
    assert training_seconds([]) == 0.0
