"""Evaluation of samples beside held-out images, with training images in the samples' place for comparison."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ..data.rows import Rows, taken
from ..errors import UserError
from ..progress import Progress
from ..rng import generator
from .checks import check_sets, image_shape
from .extraction import dimensions, extract, logits
from .image_sets import ImageSet, ImageSets
from .measuring import check_counts, choose, mean, measure
from .registry import FeatureExtractor, Metric, Need
from .result import EvaluationResult

SETS = {"samples": "count={}", "train": "{} training images", "held-out": "{} held-out images"}  # words of messages
_MENDS = {
    "samples": "give a larger count",
    "train": "give other images with --data",
    "held-out": "give other images with --data, or train with a larger data.held_out",
}


def held_out_metrics(
    names: Sequence[str],
    extractor: FeatureExtractor,
    counts: Mapping[str, int],
    *,
    labels: bool = False,
    reconstructed: bool = False,
) -> dict[str, Metric]:
    """Return the metrics that `evaluate_samples` computes.

    Args:
        names: as in `choose`.
        extractor: the feature function.
        counts: number of images of each of SETS.
        labels: whether all sets have class labels.
        reconstructed: whether there are reconstructions.

    Without names, a metric that needs more real images than there are is left out, with a warning, if others remain.

    Raises:
        UserError: if a named metric cannot be computed, or a set holds too few images for a metric.
    """
    known: set[Need] = {"moments", "features", "images", "training"}
    optional: dict[Need, bool] = {"logits": extractor.has_logits, "labels": labels, "reconstructed": reconstructed}
    known |= {need for need, there in optional.items() if there}
    metrics = choose(names, known, "held-out")
    for name, count in counts.items():
        words = SETS[name].format(count)
        if not names and name != "samples":  # its count is the caller's choice
            metrics = _with_enough(metrics, words, count)
        check_counts(metrics, {words: count}, _MENDS[name])
    return metrics


def _with_enough(metrics: dict[str, Metric], words: str, count: int) -> dict[str, Metric]:
    """Leave out metrics that need more images than `count`, with a warning, if others remain."""
    enough = {name: metric for name, metric in metrics.items() if metric.least <= count}
    for name in metrics.keys() - enough.keys() if enough else ():
        warnings.warn(f"{words}: metric {name!r} needs at least {metrics[name].least} and is left out", stacklevel=3)
    return enough or metrics


def evaluate_samples(
    samples: Tensor | Rows,
    train: Tensor | Rows,
    held_out: Tensor | Rows,
    extractor: FeatureExtractor,
    *,
    metrics: Sequence[str] = (),
    labels: Sequence[Tensor] | None = None,
    count: int | None = None,
    splits: int = 5,
    seed: int = 0,
    reconstructed: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> EvaluationResult:
    """Compare samples with held-out images, and training images with held-out images in the same way.

    The Fréchet distance decreases with the number of images, so each split draws the same number from all sets.
    The training and held-out draws are disjoint sets of real images; their values are those of a perfect model.

    Args:
        samples: uint8 (N, C, H, W).
        train: uint8 (M, C, H, W), the images trained on; a tensor, or the rows of a data set, of which only the drawn
            ones are in memory at a time.
        held_out: uint8 (K, C, H, W), real images not trained on; as `train`.
        extractor: feature function.
        metrics: names of the metrics; none: all that can be computed.
        labels: class labels of samples, training and held-out images, int64 (N,), (M,) and (K,); None if unknown.
        count: images drawn from each set; default: the size of the smallest set.
        splits: number of draws to average over.
        seed: seed of the draws.
        reconstructed: uint8 (K, C, H, W), the held-out images encoded and decoded by the samples' codec, if any.
        device: where features are computed.
        progress: called with (images done, total) while the features of a set are computed.

    Raises:
        UserError: for unequal shapes, too few images, a metric that cannot be computed, or features that are not finite.
    """
    check_sets(samples, train, held_out)
    images = dict(zip(SETS, (samples, train, held_out), strict=True))
    smallest = min(map(len, images.values()))
    count = smallest if count is None else count
    if not 0 < count <= smallest:
        sizes = f"{len(samples)} samples, {len(train)} training and {len(held_out)} held-out images"
        raise UserError(f"count={count} must be between 1 and {smallest}, the size of the smallest set ({sizes})")
    if splits < 1:
        raise UserError(f"splits={splits} must be at least 1")
    if reconstructed is not None:
        check_sets(reconstructed, train, held_out)
    chosen = held_out_metrics(
        metrics,
        extractor,
        {name: len(part) for name, part in images.items()},
        labels=labels is not None,
        reconstructed=reconstructed is not None,
    )
    check_counts(chosen, {f"count={count}": count}, _MENDS["samples"])
    named = dict(zip(SETS, labels or (None,) * len(SETS), strict=True))
    how = (extractor, device, progress)
    draws = [_Draws(images[name], named[name], name, (count, splits, seed), *how) for name in SETS]
    if reconstructed is not None:  # drawn as samples are
        draws.append(_Draws(reconstructed, named["held-out"], "samples", (count, splits, seed), *how))
    once = measure([m for m in chosen.values() if m.all_images], _sets([d.whole() for d in draws]))
    drawn = [m for m in chosen.values() if not m.all_images]
    values = mean([measure(drawn, _sets([d.drawn(split) for d in draws])) for split in range(splits)])
    dims = dimensions(extractor, image_shape(samples), device)
    return EvaluationResult(
        against="held-out",
        extractor=extractor.name,
        comparable_to=extractor.comparable_to,
        preprocessing=describe_preprocessing(samples, extractor),
        reference="held-out images",
        reference_count=len(held_out),
        training_count=len(train),
        samples=len(samples),
        count=count,
        splits=splits,
        seed=seed,
        dims=dims,
        rank_deficient=count <= dims,
        metrics=values | once,
    )


def describe_preprocessing(images: Tensor | Rows, extractor: FeatureExtractor) -> str:
    """Return the images' type and shape and their preprocessing, as text."""
    return f"uint8 images of {' x '.join(map(str, image_shape(images)))} (C x H x W): {extractor.preprocessing}"


def _sets(sets: Sequence[ImageSet]) -> ImageSets:
    samples, training, real, *reconstructed = sets
    return ImageSets(
        samples=samples, real=real, training=training, reconstructed=reconstructed[0] if reconstructed else None
    )


class _Draws:
    """Random draws from one set of images; each drawn image passes through the extractor once, others never.

    Args:
        images: uint8 (N, C, H, W), a tensor or the rows of a data set.
        labels: int64 (N,), or None.
        name: name of the set, part of the seed.
        draw: (count, splits, seed).
        extractor: feature function.
        device: where features are computed.
        progress: called with (images done, total).
    """

    def __init__(
        self,
        images: Tensor | Rows,
        labels: Tensor | None,
        name: str,
        draw: tuple[int, int, int],
        extractor: FeatureExtractor,
        device: torch.device | str,
        progress: Progress | None = None,
    ) -> None:
        self.images, self.labels, self.extractor, self.device = images, labels, extractor, device
        self._extract = partial(extract, extractor, device=device, progress=progress)
        count, splits, seed = draw
        orders = [generator((seed, "evaluation", split, name)) for split in range(splits)]
        self.rows = [torch.randperm(len(images), generator=order)[:count] for order in orders]

    @cached_property
    def features(self) -> list[Tensor]:
        """Features of every draw, on the CPU."""
        used, where = torch.unique(torch.cat(self.rows), return_inverse=True)
        features = self._extract(taken(self.images, used)).cpu()
        return [features[rows] for rows in where.split([len(rows) for rows in self.rows])]

    def drawn(self, split: int) -> ImageSet:
        """Return one draw."""
        return self._image_set(self.rows[split], lambda: self.features[split])

    def whole(self) -> ImageSet:
        """Return all images."""
        features = lambda: self._extract(self.images).cpu()  # noqa: E731
        return self._image_set(None, features)

    def _image_set(self, rows: Tensor | None, features: Callable[[], Tensor]) -> ImageSet:
        """Return the images of some rows; None: of all."""
        images, labels = self.images, self.labels
        sources: dict[str, Callable[[], Any]] = {
            "image_rows": lambda: images if rows is None else taken(images, rows),
            "features": features,
        }
        if labels is not None:
            sources["labels"] = lambda: labels if rows is None else labels[rows.to(labels.device)]
        count = len(images) if rows is None else len(rows)
        found = ImageSet(count, **sources, logits=lambda: logits(self.extractor, found.features, self.device))
        return found
