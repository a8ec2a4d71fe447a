"""Class labels of samples: drawn with the training images' frequencies for metrics, cycled through for previews."""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..data import ImageData
from ..errors import UserError
from ..rng import uniform

_NAMED = 10  # classes that a warning lists


def class_counts(images: ImageData, classes: int) -> tuple[int, ...]:
    """Return the number of images of each class; () if classes is 0 or the images have no labels.

    Args:
        images: their labels are below `classes`.
        classes: number of classes.
    """
    if not classes or images.labels is None:
        return ()
    return tuple(np.bincount(images.labels, minlength=classes).tolist())


def warn_of_empty(counts: tuple[int, ...]) -> None:
    """Warn about classes without training images: the network has not learnt them."""
    empty = [str(label) for label, count in enumerate(counts) if not count]
    if empty:
        named = ", ".join(empty[:_NAMED]) + (", ..." if len(empty) > _NAMED else "")
        warnings.warn(
            f"{len(empty)} of {len(counts)} classes have no training images ({named}): no samples are drawn of them unless "
            "--label asks for one; labels count from 0 (network.num_classes)",
            stacklevel=3,
        )


def frequent_labels(config: RunConfig, count: int, seed: int) -> Tensor | None:
    """Return class labels drawn with the training images' frequencies; None for an unconditional network.

    Metrics compare samples with real images, so both need the same class frequencies.

    Args:
        config: of a run. Without class counts (a run of an earlier release, or imported) all classes have equal
            probability.
        count: number of samples.
        seed: determines the labels, together with the sample number.

    Returns:
        int64 (count,); label i depends only on (seed, i) and the frequencies.
    """
    if not config.network.num_classes:
        return None
    u = uniform(("labels", seed), torch.arange(count), 1)[:, 0]
    if not config.data.class_counts:
        warnings.warn(
            "data.class_counts is unknown (a run of an earlier release, or imported): classes are drawn with equal shares; "
            "resume the run to record them",
            stacklevel=3,
        )
    bounds = torch.tensor(_counts(config), dtype=torch.float64).cumsum(0)
    return torch.bucketize(u * bounds[-1], bounds, right=True)


def labels_in_turn(config: RunConfig, count: int) -> Tensor | None:
    """Return labels int64 (count,) that cycle through the classes with training images; None if unconditional."""
    if not config.network.num_classes:
        return None
    present = torch.tensor(_counts(config)).nonzero().flatten()
    return present[torch.arange(count) % len(present)]


def _counts(config: RunConfig) -> tuple[int, ...]:
    counts, classes = config.data.class_counts, config.network.num_classes
    if counts and len(counts) != classes:
        raise UserError(
            f"data.class_counts holds {len(counts)} numbers, but network.num_classes={classes}; put it back"
        )
    return counts or (1,) * classes
