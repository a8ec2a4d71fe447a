"""The registries of evaluation, FEATURES and METRICS, and the base classes of what they hold.

One more module in this folder adds a feature extractor or a metric:

    @METRICS.add("brightness")
    class Brightness(Metric):
        needs = frozenset({"images"})
        shown = (Display(name="brightness", label="Brightness", words="Mean value of the samples' pixels."),)

        def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
            return {"brightness": MetricValue(value=float(sets.samples.images.float().mean()))}
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from ..registry import Registry
from .image_sets import ImageSets


class FeatureExtractor(ABC):
    """Maps images to feature vectors; its name is part of every result computed from it.

    Attributes:
        extra: the extra of this package whose packages it needs; empty for none.
        takes_weights: whether `build` takes a file of weights.
        title: name without the digest.
        digest: identifies weights and versions; empty if nothing can differ.
        comparable_to: results that its results may be compared with.
        preprocessing: processing of the images before the network.
        activation_bytes: memory that one image takes during the computation, without its features; 0 if unknown.
        has_logits: whether there are `logits`.
    """

    extra: ClassVar[str] = ""
    takes_weights: ClassVar[bool] = False
    title: str
    digest: str = ""
    comparable_to: str
    preprocessing: str
    activation_bytes: int = 0
    has_logits: bool = False

    @classmethod
    def build(cls, weights: Path | None = None) -> FeatureExtractor:
        """Return the extractor.

        Args:
            weights: a file of its weights; None: its own default. None is the only value if `takes_weights` is False.
        """
        return cls()

    @property
    def name(self) -> str:
        """The name in results and files: the title, with the digest."""
        return f"{self.title} ({self.digest})" if self.digest else self.title

    @abstractmethod
    def __call__(self, images: Tensor) -> Tensor:
        """Map uint8 images (N, C, H, W) to float features (N, D), on the images' device."""

    def logits(self, features: Tensor) -> Tensor:
        """Map features (N, D) to the logits (N, classes) of the classifier that they come from."""
        raise NotImplementedError(f"{self.name} has no logits")


FEATURES: Registry[type[FeatureExtractor]] = Registry("features", __package__)


@dataclass(frozen=True, kw_only=True)
class Display:
    """How a value of a metric is shown.

    Attributes:
        name: name of the value in results, unique over all metrics.
        label: short name.
        words: one or two sentences of explanation.
        better: the direction of better values; None: neither.
        unit: "%" for a share in [0, 1], shown times 100; otherwise appended to the number.
        comparable_to: values that it may be compared with; empty: those of the same features and counts.
    """

    name: str
    label: str
    words: str = ""
    better: Literal["lower", "higher"] | None = None
    unit: str = ""
    comparable_to: str = ""


@dataclass(frozen=True, kw_only=True)
class MetricValue:
    """A value of a metric.

    Attributes:
        value: of the samples.
        real: the same for real images in the samples' place; None if not measured.
        deviation: standard deviation, for example over subsets; None if not estimated.
        settings: a dict of what the value depends on, for example {"k": 3}.
    """

    value: float
    real: float | None = None
    deviation: float | None = None
    settings: Mapping[str, float | str] = field(default_factory=dict)


# what a metric reads
Need = Literal[
    "moments",  # of the features of samples and real images
    "features",  # of samples and real images
    "logits",  # of samples
    "images",  # of samples and real images
    "labels",  # of samples and real images
    "training",  # training images: all of the above that the metric needs
    "reconstructed",  # real images through the codec: all of the above that the metric needs
]

# what samples are compared with: drawn held-out images, or statistics of a reference set
Against = Literal["held-out", "statistics"]


class Metric(ABC):
    """A metric of samples; one instance is made for each evaluation.

    Attributes:
        shown: its values, and how they are shown.
        needs: what it reads of the sets.
        against: where it is computed. Evaluation during training is "statistics", of the training images.
        least: the smallest number of images in a set.
        all_images: whether it is computed once on all images instead of on every draw of equal counts (held-out).
        with_real_baseline: whether it is also measured with training images in the samples' place (held-out), the value
            that a perfect model would reach.
    """

    shown: ClassVar[tuple[Display, ...]]
    needs: ClassVar[frozenset[Need]]
    against: ClassVar[frozenset[Against]] = frozenset({"held-out", "statistics"})
    least: int = 2
    all_images: ClassVar[bool] = False
    with_real_baseline: ClassVar[bool] = True

    def unavailable(self) -> str:
        """Return why it cannot be computed on this machine, for example a missing package; empty if it can."""
        return ""

    @abstractmethod
    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        """Return its values by name, those of `shown`."""


METRICS: Registry[type[Metric]] = Registry("metrics", __package__)
