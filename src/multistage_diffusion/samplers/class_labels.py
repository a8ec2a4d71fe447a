"""Classes of samples: with the training images' frequencies where samples are measured, in turn where they are shown."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..data import ImageData
from ..errors import UserError
from ..rng import uniform

_NAMED = 10  # classes that a warning lists


def with_class_counts(config: RunConfig, training: ImageData) -> RunConfig:
    """Return a run's configuration that knows how many training images each class has; warn of classes without any.

    Args:
        config: of a run; it stays as it is without network.num_classes.
        training: the training images, with labels below network.num_classes.
    """
    classes = config.network.num_classes
    if not classes or training.labels is None:
        return config
    counts = tuple(np.bincount(training.labels, minlength=classes).tolist())
    warn_of_empty(counts)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, class_counts=counts))


def warn_of_empty(counts: tuple[int, ...]) -> None:
    """Name the classes that have no images: samples of them would be of nothing that was learnt."""
    empty = [str(label) for label, count in enumerate(counts) if not count]
    if empty:
        named = ", ".join(empty[:_NAMED]) + (", ..." if len(empty) > _NAMED else "")
        warnings.warn(
            f"{len(empty)} of {len(counts)} classes have no training images ({named}): no samples are drawn of them unless "
            "--label asks for one; labels count from 0 (network.num_classes)",
            stacklevel=3,
        )


def frequent_labels(config: RunConfig, count: int, seed: int) -> Tensor | None:
    """Return class labels with the training images' frequencies, None for an unconditional network.

    Metrics compare samples with real images, whose classes may be of very unequal size: so the samples' are, too.

    Args:
        config: of a run. One that does not know its class counts (of an earlier release) gets equal shares.
        count: number of samples.
        seed: with the sample's number, decides its label.

    Returns:
        int64 (count,); label i depends on (seed, i) and the frequencies alone.
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
    """Return the labels of classes that have training images, in turn; int64 (count,), None for an unconditional network."""
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
