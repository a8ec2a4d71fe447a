"""Class labels of samples: drawn with the training images' frequencies for metrics, cycled through for previews.

A class has a number, from 0, and a name: the data's, or else its number as text.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig
from ..data import ImageData
from ..errors import UserError
from ..rng import uniform

_NAMED = 10  # classes that a message lists


def class_counts(images: ImageData, classes: int) -> tuple[int, ...]:
    """Return the number of images of each class; () if classes is 0 or the images have no labels.

    Args:
        images: their labels are below `classes`.
        classes: number of classes.
    """
    if not classes or images.labels is None:
        return ()
    return tuple(np.bincount(images.labels, minlength=classes).tolist())


def class_names(images: ImageData, classes: int) -> tuple[str, ...]:
    """Return the names of the classes; () if classes is 0, or the images' classes have numbers only."""
    names = images.class_names[:classes]
    return () if names == tuple(str(label) for label in range(len(names))) else names


def class_name(config: RunConfig, label: int) -> str:
    """Return the name of a class of a run."""
    names = config.data.class_names
    return names[label] if label < len(names) else str(label)


def names_of(config: RunConfig, labels: Tensor | None) -> list[str] | None:
    """Return the class name of each label, int64 (N,); None without labels."""
    return None if labels is None else [class_name(config, label) for label in labels.tolist()]


def class_number(config: RunConfig, label: int | str) -> int:
    """Return the number of a class that is given by its number or its name; a name is tried first.

    Raises:
        UserError: if the run is unconditional, has no such class, or has several of this name.
    """
    classes = config.network.num_classes
    if not classes:
        raise UserError(
            f"label={label}: the run is unconditional; leave it out (network.num_classes, set when a training starts, lets it "
            "learn classes)"
        )
    names = config.data.class_names[:classes]
    named = [number for number, name in enumerate(names) if name == label]
    if len(named) > 1:
        raise UserError(f"label={label}: is the name of classes {_listed(named)}; give the number")
    if named:
        return named[0]
    number = label if isinstance(label, int) else int(label) if label.isdecimal() else -1
    if 0 <= number < classes:
        if config.data.class_counts and not config.data.class_counts[number]:
            warnings.warn(f"label={number}: the run was trained on no image of this class", stacklevel=2)
        return number
    near = difflib.get_close_matches(str(label), names, 1)
    if near:
        raise UserError(f"label={label}: no class of this name; did you mean {near[0]!r}?")
    hint = f", or one of {_listed(names)}" if names else ""
    raise UserError(f"label={label}: it must be in 0..{classes - 1}{hint}")


def _listed(values: Sequence[object]) -> str:
    return ", ".join(str(value) for value in values[:_NAMED]) + (", ..." if len(values) > _NAMED else "")


def warn_of_empty(counts: tuple[int, ...], names: tuple[str, ...] = ()) -> None:
    """Warn about classes without training images: the network has not learnt them.

    Args:
        counts: training images of each class.
        names: names of the first classes; the others are named by their numbers.
    """
    empty = [f"{label} {names[label]}" if label < len(names) else str(label) for label, n in enumerate(counts) if not n]
    if empty:
        warnings.warn(
            f"{len(empty)} of {len(counts)} classes have no training images ({_listed(empty)}): no samples are drawn of them "
            "unless --label asks for one; labels count from 0 (network.num_classes)",
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
