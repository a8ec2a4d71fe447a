"""The Inception score, computed by torch-fidelity (extra `eval`)."""

from __future__ import annotations

from torch import Tensor

from ..errors import UserError
from .fidelity import torch_fidelity_package, why_unavailable
from .image_sets import ImageSets
from .registry import METRICS, Display, Metric, MetricValue

PARTS = 10  # as published


@METRICS.add("inception-score")
class InceptionScore(Metric):
    """Inception score by the classifier of the features; its deviation is over parts of the samples."""

    shown = (
        Display(
            name="inception_score",
            label="Classifier score",
            words="Inception score, by the classifier of these features.",
            better="higher",
            comparable_to="scores of the same classifier",
        ),
    )
    needs = frozenset({"logits"})
    against = frozenset({"statistics"})
    least = PARTS

    def unavailable(self) -> str:
        """Return the missing package."""
        return why_unavailable()

    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        """Return "inception_score"."""
        mean, deviation = inception_score(sets.samples.logits)
        return {"inception_score": MetricValue(value=mean, deviation=deviation, settings={"parts": PARTS})}


def inception_score(logits: Tensor) -> tuple[float, float]:
    """Return the Inception score (Salimans et al. 2016): mean and standard deviation over 10 parts.

    Args:
        logits: classifier logits (N, classes), N >= 10.

    Raises:
        UserError: if torch-fidelity is not installed, or there are fewer than 10 rows.
    """
    torch_fidelity_package()
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if len(logits) < PARTS:
        raise UserError(f"Inception score: {len(logits)} images cannot be divided into {PARTS} parts; draw more")
    found = isc_features_to_metric(logits.cpu(), splits=PARTS)
    return found[KEY_METRIC_ISC_MEAN], found[KEY_METRIC_ISC_STD]
