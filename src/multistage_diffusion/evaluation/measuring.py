"""Choice of the metrics that can be computed, and their values on sets of images."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence, Set

import torch

from ..errors import UserError
from .image_sets import ImageSets
from .registry import METRICS, Against, Display, Metric, MetricValue, Need

Metrics = Mapping[str, Metric]

_LACKS: dict[Need, str] = {
    "moments": "needs features",
    "features": "needs features of real images; make the statistics with --keep",
    "logits": "needs features of a classifier",
    "images": "needs real images, not statistics; compare with held-out images",
    "labels": "needs a class-conditional run and labelled images",
    "training": "needs training images; compare with held-out images",
    "reconstructed": "needs a run on latents, compared with held-out images",
}


def choose(names: Sequence[str], known: Set[Need], against: Against) -> dict[str, Metric]:
    """Return the metrics to compute, by name.

    Args:
        names: their names; none: all that can be computed.
        known: what is known of the images.
        against: what the samples are compared with.

    Raises:
        UserError: for a name that is unknown, or whose metric cannot be computed.
    """
    metrics: dict[str, Metric] = {name: METRICS[name]() for name in (names or METRICS)}
    reasons = {name: _obstacle(metric, known, against) for name, metric in metrics.items()}
    for name, reason in reasons.items():
        if reason and names:
            raise UserError(f"metrics={name!r}: {reason}; or leave it out")
    return {name: metric for name, metric in metrics.items() if not reasons[name]}


def _obstacle(metric: Metric, known: Set[Need], against: Against) -> str:
    """Return why a metric cannot be computed; empty if it can."""
    if against not in metric.against:
        return f"is computed against {', '.join(sorted(metric.against))} only; choose another --against"
    missing = [words for need, words in _LACKS.items() if need in metric.needs and need not in known]
    return missing[0] if missing else metric.unavailable()


def needed(metrics: Metrics) -> set[Need]:
    """Return what these metrics read."""
    return {need for metric in metrics.values() for need in metric.needs}


def check_counts(metrics: Metrics, counts: Mapping[str, int], mend: str) -> None:
    """Check that every set holds enough images for every metric.

    Args:
        metrics: the metrics; none: nothing is checked.
        counts: number of images of each set, by words for the message that include it, such as "count=9".
        mend: how to get more images.

    Raises:
        UserError: naming the set, its count, the metric and the smallest count.
    """
    if not metrics:
        return
    name = max(metrics, key=lambda metric: metrics[metric].least)
    for what, count in counts.items():
        if count < metrics[name].least:
            raise UserError(f"{what}: metric {name!r} needs at least {metrics[name].least} images; {mend}")


def measure(metrics: Iterable[Metric], sets: ImageSets) -> dict[str, MetricValue]:
    """Return all values of metrics; a value that is not finite is left out, with a warning."""
    found: dict[str, MetricValue] = {}
    for metric in metrics:
        values = metric.measure(sets)
        if metric.with_real_baseline and sets.training is not None:
            real = metric.measure(dataclasses.replace(sets, samples=sets.training))
            values = {name: dataclasses.replace(value, real=real[name].value) for name, value in values.items()}
        found |= values
    for name, value in found.items():
        if not _finite(value):
            warnings.warn(f"metric value {name}={value.value} is not finite and is left out", stacklevel=2)
    return {name: value for name, value in found.items() if _finite(value)}


def _finite(value: MetricValue) -> bool:
    return all(x is None or math.isfinite(x) for x in (value.value, value.real, value.deviation))


def mean(draws: Sequence[Mapping[str, MetricValue]]) -> dict[str, MetricValue]:
    """Return the means over draws of the values that every draw has; settings are those of the first draw."""
    names = [name for name in draws[0] if all(name in draw for draw in draws)]
    return {name: _mean([draw[name] for draw in draws]) for name in names}


def _mean(values: Sequence[MetricValue]) -> MetricValue:
    def average(numbers: Sequence[float | None]) -> float | None:
        known = [x for x in numbers if x is not None]
        return float(torch.tensor(known, dtype=torch.float64).mean()) if known else None

    value = average([v.value for v in values])
    assert value is not None
    return dataclasses.replace(
        values[0],
        value=value,
        real=average([v.real for v in values]),
        deviation=average([v.deviation for v in values]),
    )


def displays() -> dict[str, Display]:
    """Return how values are shown, by their names, over all metrics.

    Raises:
        ValueError: if two metrics have a value of the same name.
    """
    found: dict[str, Display] = {}
    for metric in METRICS:
        for display in METRICS[metric].shown:
            if display.name in found:
                raise ValueError(f"metrics: two metrics have a value {display.name!r}")
            found[display.name] = display
    return found
