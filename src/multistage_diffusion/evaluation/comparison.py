"""Comparison of all samples with reference statistics, the protocol of published FIDs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..progress import Progress
from .checks import check_images
from .extraction import extract, logits
from .held_out import describe_preprocessing
from .image_sets import ImageSet, ImageSets
from .measuring import check_counts, choose, measure
from .reference import Reference
from .registry import FeatureExtractor, Metric, Need
from .result import EvaluationResult


def statistics_metrics(
    names: Sequence[str], extractor: FeatureExtractor, reference: Reference, samples: int
) -> dict[str, Metric]:
    """Return the metrics that `compare_samples` computes.

    Args:
        names: as in `choose`.
        extractor: the feature function.
        reference: statistics of real images' features.
        samples: number of samples.

    Raises:
        UserError: if a named metric cannot be computed, or samples or kept features are too few for a metric.
    """
    known: set[Need] = {"moments"}
    if reference.features is not None:
        known.add("features")
    if extractor.has_logits:
        known.add("logits")
    metrics = choose(names, known, "statistics")
    check_counts(metrics, {f"count={samples}": samples}, "give a larger count")
    if reference.features is not None:
        kept = len(reference.features)
        readers = {name: metric for name, metric in metrics.items() if "features" in metric.needs}
        mend = "make the statistics again with a larger --keep, or leave the metric out"
        check_counts(readers, {f"{reference.source}: features of {kept} images are kept": kept}, mend)
    return metrics


def reference_set(reference: Reference) -> ImageSet:
    """Return the images of reference statistics as metrics see them: moments, and the features that are kept."""
    if reference.features is None:
        return ImageSet(reference.moments.count, moments=lambda: reference.moments)
    return ImageSet(reference.moments.count, moments=lambda: reference.moments, features=lambda: reference.features)


def compare_samples(
    samples: Tensor,
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    metrics: Sequence[str] = (),
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> EvaluationResult:
    """Compare samples with a reference set.

    Args:
        samples: uint8 (N, C, H, W), N >= 2.
        reference: statistics of real images' features (`Reference.require` checks that they fit).
        extractor: the feature function of the reference.
        metrics: names of the metrics; none: all that can be computed.
        device: where features are computed.
        progress: called with (samples done, N).

    Raises:
        UserError: for too few samples, a metric that cannot be computed, or features that do not match the reference.
    """
    check_images("samples", samples)
    chosen = statistics_metrics(metrics, extractor, reference, len(samples))
    features = extract(extractor, samples, device=device, progress=progress).cpu()
    own = ImageSet(
        len(samples),
        image_rows=lambda: samples,
        features=lambda: features,
        logits=lambda: logits(extractor, features, device),
    )
    dims = features.shape[1]
    return EvaluationResult(
        against="statistics",
        extractor=extractor.name,
        comparable_to=extractor.comparable_to,
        preprocessing=describe_preprocessing(samples, extractor),
        reference=reference.source,
        reference_count=reference.moments.count,
        training_count=0,
        samples=len(samples),
        count=len(samples),
        splits=1,
        seed=0,
        dims=dims,
        rank_deficient=len(samples) <= dims,
        metrics=measure(chosen.values(), ImageSets(samples=own, real=reference_set(reference))),
    )
