"""Sets of images as metrics see them: images, labels, features, logits and moments, each computed at its first use."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..data.rows import Rows, batches
from .moments import Moments, moments

T = TypeVar("T")
_BATCH = 1024  # rows read at a time


class ImageSet:
    """A set of images.

    Args:
        count: number of images; 0 if unknown.
        sources: functions that return what is known, by the name of the property; `moments` follow from `features`.
    """

    def __init__(self, count: int, **sources: Callable[[], Any]) -> None:
        self.count, self._sources = count, sources
        self._results: dict[Hashable, Any] = {}

    def once(self, key: Hashable, compute: Callable[[], T]) -> T:
        """Return compute() of the first call with this key."""
        if key not in self._results:
            self._results[key] = compute()
        result: T = self._results[key]
        return result

    @property
    def image_rows(self) -> Tensor | Rows:
        """The images, uint8 (N, C, H, W): a tensor, or the rows of a data set, which need not fit into memory."""
        found: Tensor | Rows = self._known("image_rows")
        return found

    @property
    def images(self) -> Tensor:
        """The images as a tensor, uint8 (N, C, H, W)."""
        rows = self.image_rows
        return self.once("images", lambda: rows if isinstance(rows, Tensor) else torch.cat([*batches(rows, _BATCH)]))

    @property
    def labels(self) -> Tensor:
        """Class labels, int64 (N,)."""
        found: Tensor = self._known("labels")
        return found

    @property
    def features(self) -> Tensor:
        """Features (N, D), on the CPU."""
        found: Tensor = self._known("features")
        return found

    @property
    def logits(self) -> Tensor:
        """Logits of the classifier behind the features (N, classes), on the CPU."""
        found: Tensor = self._known("logits")
        return found

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the features."""
        found: Moments = self.once("moments", self._sources.get("moments", lambda: moments(self.features)))
        return found

    def _known(self, name: str) -> Any:
        if name not in self._sources:
            raise LookupError(f"{name} of this set are not known; a metric that reads them lists them in `needs`")
        return self.once(name, self._sources[name])


@dataclass(frozen=True, kw_only=True)
class ImageSets:
    """The sets that a metric compares.

    Attributes:
        samples: the samples of a run.
        real: the real images that they are compared with.
        training: training images; None if not compared.
        reconstructed: real images, encoded and decoded by the run's codec; None without a codec.
    """

    samples: ImageSet
    real: ImageSet
    training: ImageSet | None = None
    reconstructed: ImageSet | None = None
