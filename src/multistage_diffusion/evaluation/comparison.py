"""Comparison of all samples with reference statistics, the protocol of published FIDs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..contracts import FeatureExtractor
from ..errors import UserError
from ..progress import Progress
from .features import extract
from .fidelity import INCEPTION_SPLITS, KID_SUBSET_SIZE, inception_score, installed, kernel_distance
from .image_check import check_images
from .metrics import precision_recall
from .reference import Reference
from .statistics import frechet_between, moments


@dataclass(frozen=True, kw_only=True)
class ComparisonResult:
    """Metrics of samples against a reference set, with the settings needed to interpret them.

    Attributes:
        extractor, comparable_to, preprocessing: the features of all metrics.
        reference: source of the reference statistics.
        reference_count: number of its images; 0 if unknown.
        samples: number of samples.
        dims: feature dimensions.
        rank_deficient: samples <= dims, so the covariance is singular; compare `frechet` only at equal counts.
        frechet: Fréchet distance; with Inception features, the FID.
        kid, kid_deviation, kid_subset: kernel distance, its standard deviation over 100 subsets, and the subset size;
            None without torch-fidelity or without kept features of the reference.
        inception_score, inception_deviation, inception_splits: score of the classifier of the features (with Inception
            features, the Inception score), its standard deviation and number of parts; None without torch-fidelity,
            for features without a classifier, or for fewer than 10 samples.
        precision, recall, k, neighbour_count: improved precision and recall with k neighbours, on neighbour_count
            samples and as many kept features of the reference; None if no features were kept.
    """

    extractor: str
    comparable_to: str
    preprocessing: str
    reference: str
    reference_count: int
    samples: int
    dims: int
    rank_deficient: bool
    frechet: float
    kid: float | None
    kid_deviation: float | None
    kid_subset: int | None
    inception_score: float | None
    inception_deviation: float | None
    inception_splits: int | None
    precision: float | None
    recall: float | None
    k: int | None
    neighbour_count: int | None


def compare_samples(
    samples: Tensor,
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    k: int = 3,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> ComparisonResult:
    """Compare samples with a reference set.

    Args:
        samples: uint8 (N, C, H, W), N >= 2.
        reference: statistics of real images' features (`Reference.require` checks that they fit).
        extractor: the feature function of the reference.
        k: neighbours of precision and recall.
        device: where features are computed.
        progress: called with (samples done, N).

    Raises:
        UserError: for too few samples, or features that do not match the reference or that the metrics do not accept.
    """
    check_images("samples", samples)
    check_count(len(samples), reference, k)
    features = extract(extractor, samples, device=device, progress=progress)
    found: dict[str, Any] = dict.fromkeys(
        ("kid", "kid_deviation", "kid_subset", "inception_score", "inception_deviation", "inception_splits")
    )
    logits: Callable[[Tensor], Tensor] | None = getattr(extractor, "logits", None)
    if logits is not None and installed() and len(samples) >= INCEPTION_SPLITS:
        score, deviation = inception_score(logits(features))
        found |= {
            "inception_score": score,
            "inception_deviation": deviation,
            "inception_splits": INCEPTION_SPLITS,
        }
    features = features.cpu()
    kept = reference.features
    if kept is not None and installed():
        subset = min(KID_SUBSET_SIZE, len(kept), len(features))
        kid, deviation = kernel_distance(features, kept, subset)
        found |= {"kid": kid, "kid_deviation": deviation, "kid_subset": subset}
    count = None if kept is None else min(len(kept), len(features))
    precision, recall = (None, None) if kept is None else precision_recall(kept[:count], features[:count], k)
    dims = features.shape[1]
    return ComparisonResult(
        extractor=extractor.name,
        comparable_to=extractor.comparable_to,
        preprocessing=f"uint8 images of {' x '.join(map(str, samples.shape[1:]))} (C x H x W): {extractor.preprocessing}",
        reference=reference.source,
        reference_count=reference.moments.count,
        samples=len(samples),
        dims=dims,
        rank_deficient=len(samples) <= dims,
        frechet=frechet_between(moments(features), reference.moments),
        precision=precision,
        recall=recall,
        k=None if kept is None else k,
        neighbour_count=count,
        **found,
    )


def check_count(samples: int, reference: Reference, k: int) -> None:
    """Check that there are enough samples and kept reference features for the metrics.

    Raises:
        UserError: naming the smallest count.
    """
    kept = reference.features
    least = 2 if kept is None else k + 1
    if samples < least:
        raise UserError(f"count={samples}: comparing with {reference.source} needs at least {least} samples")
    if kept is not None and len(kept) <= k:
        raise UserError(f"{reference.source}: keeps {len(kept)} features; precision and recall need more than k={k}")
