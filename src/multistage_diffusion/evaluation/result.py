"""The result of an evaluation, and its record in RUN/evaluation.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..records import FINITE, TEXT, Kind, check, fields_of, named
from .registry import MetricValue

_MEND = "; evaluate the run again"
_ENTRY = Kind("a mapping", lambda value: isinstance(value, dict))
_SETTING = Kind("a number or text", lambda value: FINITE.fits(value) or TEXT.fits(value))


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """Values of metrics, with everything needed to interpret them.

    Attributes:
        against: what the samples are compared with: "held-out" images, drawn in equal numbers, or "statistics".
        extractor, comparable_to, preprocessing: the features.
        reference: source of the real images or statistics.
        reference_count: number of their images; 0 if unknown.
        training_count: number of training images, which are measured in the samples' place; 0 if not measured.
        samples: number of samples.
        count: images of each set that a metric compares at a time.
        splits: number of random draws of `count` images over which values are averaged; 1 against statistics.
        seed: seed of the draws.
        dims: feature dimensions.
        rank_deficient: count <= dims, so that covariances are singular; compare only values of equal counts.
        metrics: the values, by name.
    """

    against: str
    extractor: str
    comparable_to: str
    preprocessing: str
    reference: str
    reference_count: int
    training_count: int
    samples: int
    count: int
    splits: int
    seed: int
    dims: int
    rank_deficient: bool
    metrics: dict[str, MetricValue]


def read_result(record: Mapping[str, Any]) -> EvaluationResult:
    """Return the result in an entry of evaluation.json; other keys are ignored.

    Raises:
        UserError: naming the field and its value.
    """
    fields, _ = fields_of(EvaluationResult, without=("metrics",))
    check(record, {**fields, "metrics": named(_ENTRY)}, "evaluation", mend=_MEND)
    values = {name: _value(name, entry) for name, entry in record["metrics"].items()}
    return EvaluationResult(**{name: record[name] for name in fields}, metrics=values)


def _value(name: str, entry: Mapping[str, Any]) -> MetricValue:
    required, optional = fields_of(MetricValue, without=("settings",))
    where = f"evaluation: metrics.{name}"
    check(entry, required, where, mend=_MEND)
    check(entry, {**optional, "settings": named(_SETTING)}, where, optional=True, mend=_MEND)
    return MetricValue(**{key: entry[key] for key in (*required, *optional, "settings") if key in entry})
