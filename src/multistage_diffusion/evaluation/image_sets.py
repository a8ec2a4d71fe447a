"""Sets of images as metrics see them: images, labels, features, logits and moments, each computed at its first use."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from .moments import Moments, moments

T = TypeVar("T")


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
    def images(self) -> Tensor:
        """The images, uint8 (N, C, H, W)."""
        return self._known("images")

    @property
    def labels(self) -> Tensor:
        """Class labels, int64 (N,)."""
        return self._known("labels")

    @property
    def features(self) -> Tensor:
        """Features (N, D), on the CPU."""
        return self._known("features")

    @property
    def logits(self) -> Tensor:
        """Logits of the classifier behind the features (N, classes), on the CPU."""
        return self._known("logits")

    @property
    def moments(self) -> Moments:
        """Mean and covariance of the features."""
        found: Moments = self.once("moments", self._sources.get("moments", lambda: moments(self.features)))
        return found

    def _known(self, name: str) -> Tensor:
        if name not in self._sources:
            raise LookupError(f"{name} of this set are not known; a metric that reads them lists them in `needs`")
        found: Tensor = self.once(name, self._sources[name])
        return found


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
