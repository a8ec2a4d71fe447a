from __future__ import annotations

import math

import pytest
import torch

from multistage_diffusion.evaluation import measuring
from multistage_diffusion.evaluation.image_sets import ImageSet, ImageSets
from multistage_diffusion.evaluation.measuring import check_counts, choose, displays, mean, measure, needed
from multistage_diffusion.evaluation.precision_recall import PrecisionRecall
from multistage_diffusion.evaluation.registry import METRICS, Display, Metric, MetricValue, Need

EVERYTHING: set[Need] = {"moments", "features", "logits", "images", "labels", "training", "reconstructed"}


class Largest(Metric):
    """The largest feature of the samples."""

    shown = (Display(name="largest", label="Largest"),)
    needs = frozenset({"features"})

    def measure(self, sets: ImageSets) -> dict[str, MetricValue]:
        return {"largest": MetricValue(value=float(sets.samples.features.max()), deviation=2.0, settings={"a": "b"})}


def a_set(*values: float) -> ImageSet:
    return ImageSet(len(values), features=lambda: torch.tensor(values)[:, None])


def test_without_names_everything_that_can_be_computed_is_chosen() -> None:
    assert set(choose((), {"moments"}, "held-out")) == {"frechet"}
    assert set(choose((), {"moments", "features"}, "held-out")) == {"frechet", "precision-recall"}
    held_out = choose((), EVERYTHING, "held-out")
    assert set(held_out) == {"frechet", "frechet-reconstructed", "memorisation", "precision-recall"}
    assert needed(held_out) == {"moments", "features", "images", "training", "reconstructed"}


@pytest.mark.parametrize(
    ("name", "known", "message"),
    [
        ("fid", EVERYTHING, "metrics='fid' must be one of frechet, "),
        ("frechet", set(), "metrics='frechet': needs features; or leave it out"),
        ("precision-recall", {"moments"}, "metrics='precision-recall': needs features of real images; make the stat"),
        ("kid", EVERYTHING, "metrics='kid': is computed against statistics only; choose another --against; or leave"),
        ("memorisation", {"images"}, "metrics='memorisation': needs training images; compare with held-out images"),
    ],
)
def test_a_named_metric_that_cannot_be_computed_is_refused(name: str, known: set[Need], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose([name], known, "held-out")


def test_every_set_needs_enough_images() -> None:
    metrics: dict[str, Metric] = {"pr": PrecisionRecall(), "largest": Largest()}
    check_counts(metrics, {"count=4": 4, "4 others": 4}, "give more")
    with pytest.raises(ValueError, match="3 others: metric 'pr' needs at least 4 images; give more"):
        check_counts(metrics, {"count=4": 4, "3 others": 3}, "give more")


def test_training_images_stand_in_for_samples() -> None:
    sets = ImageSets(samples=a_set(1.0, 5.0), real=a_set(0.0), training=a_set(3.0, 2.0))
    assert measure([Largest()], sets) == {
        "largest": MetricValue(value=5.0, real=3.0, deviation=2.0, settings={"a": "b"})
    }
    alone = ImageSets(samples=sets.samples, real=sets.real)
    assert measure([Largest()], alone)["largest"].real is None


def test_values_that_are_not_finite_are_left_out() -> None:
    sets = ImageSets(samples=a_set(math.nan), real=a_set(0.0))
    with pytest.warns(UserWarning, match="metric value largest=nan is not finite and is left out"):
        assert measure([Largest()], sets) == {}


def test_the_mean_over_draws() -> None:
    draws = [
        {"a": MetricValue(value=1.0, real=3.0, settings={"k": 1}), "b": MetricValue(value=0.0)},
        {"a": MetricValue(value=2.0, real=5.0, deviation=4.0)},
    ]
    assert mean(draws) == {"a": MetricValue(value=1.5, real=4.0, deviation=4.0, settings={"k": 1})}


def test_names_of_values_are_unique(monkeypatch: pytest.MonkeyPatch) -> None:
    assert displays()["frechet"].label == "Fréchet distance"
    twice = type("Twice", (Largest,), {"shown": METRICS["frechet"].shown})
    monkeypatch.setattr(measuring, "METRICS", {"frechet": METRICS["frechet"], "twice": twice})
    with pytest.raises(ValueError, match="two metrics have a value 'frechet'"):
        displays()
