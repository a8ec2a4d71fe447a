from __future__ import annotations

import json
from typing import Any

import pytest

from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.evaluation.registry import MetricValue
from multistage_diffusion.evaluation.result import EvaluationResult, read_result

RESULT = EvaluationResult(
    against="statistics",
    extractor="pixels",
    comparable_to="pixels",
    preprocessing="none",
    reference="real.npz",
    reference_count=9,
    training_count=0,
    samples=9,
    count=9,
    splits=1,
    seed=0,
    dims=4,
    rank_deficient=False,
    metrics={"new": MetricValue(value=1.0, real=2.0, deviation=0.5, settings={"k": 3, "of": "pixels"})},
)


def test_a_result_is_read_as_it_was_written() -> None:
    record = json.loads(json.dumps(to_dict(RESULT)))
    assert read_result({"step": 7, **record}) == RESULT
    del record["metrics"]["new"]["real"]
    assert read_result(record).metrics["new"].real is None


@pytest.mark.parametrize(
    ("at", "value", "message"),
    [
        (["dims"], -1, "evaluation: dims=-1 must be a whole number"),
        (["metrics"], [], r"evaluation: metrics=\[\] must be a mapping"),
        (["metrics", "new"], 1.0, "evaluation: metrics=.* must be a mapping"),
        (["metrics", "new", "value"], "low", "evaluation: metrics.new: value='low' must be a finite number"),
        (["metrics", "new", "settings"], {"k": None}, "metrics.new: settings=.* must be .* a number or text"),
    ],
)
def test_other_types_are_refused(at: list[str], value: Any, message: str) -> None:
    record = json.loads(json.dumps(to_dict(RESULT)))
    node = record
    for key in at[:-1]:
        node = node[key]
    node[at[-1]] = value
    with pytest.raises(ValueError, match=f"{message}.*; evaluate the run again"):
        read_result(record)
