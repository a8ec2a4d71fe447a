from __future__ import annotations

import dataclasses
import sys

import pytest
import torch

from multistage_diffusion.evaluation import PixelFeatures, extract, frechet_distance, precision_recall
from multistage_diffusion.evaluation.comparison import compare_samples, statistics_metrics
from multistage_diffusion.evaluation.reference import Reference, make_reference


def images(count: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 2, 2), generator=g, dtype=torch.uint8)


def reference(keep: int = 1000) -> Reference:
    return make_reference(PixelFeatures(), images(50, 0), data="noise", fingerprint="abc", part="train", keep=keep)


class Classified(PixelFeatures):
    title = "classified"
    has_logits = True

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :3] * 4


def test_every_number_is_the_metric_s() -> None:
    samples = images(30, 1)
    found = compare_samples(samples, reference(), PixelFeatures())
    fake, real = extract(PixelFeatures(), samples), extract(PixelFeatures(), images(50, 0))
    values = found.metrics
    assert values["frechet"].value == pytest.approx(frechet_distance(fake, real), rel=1e-12)
    kept = reference().features
    assert kept is not None
    assert (values["precision"].value, values["recall"].value) == precision_recall(kept[:30], fake, 3)
    assert values["recall"].settings == {"k": 3, "images": 30}
    assert {value.real for value in values.values()} == {None}
    assert (found.samples, found.reference_count, found.training_count) == (30, 50, 0)
    assert (found.against, found.count, found.splits) == ("statistics", 30, 1)
    assert (found.dims, found.rank_deficient) == (4, False)
    assert found.reference == "train of noise"
    assert found.preprocessing == f"uint8 images of 1 x 2 x 2 (C x H x W): {PixelFeatures.preprocessing}"
    assert compare_samples(samples[:4], reference(), PixelFeatures()).rank_deficient


def test_scores_through_torch_fidelity_have_their_settings() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    samples, kept = images(30, 1), reference().features
    assert kept is not None
    found = compare_samples(samples, reference(), Classified()).metrics
    fake = extract(PixelFeatures(), samples)
    expected = kid.kid_features_to_metric(
        fake.double(), kept.double(), kid_subsets=100, kid_subset_size=30, verbose=False
    )
    assert found["kid"].value == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert found["kid"].deviation == pytest.approx(expected["kernel_inception_distance_std"], rel=1e-9)
    assert found["kid"].settings == {"subsets": 100, "features per subset": 30}
    score = isc.isc_features_to_metric(fake[:, :3] * 4, splits=10)
    assert found["inception_score"].value == pytest.approx(score["inception_score_mean"], rel=1e-9)
    assert found["inception_score"].settings == {"parts": 10}
    assert "inception_score" not in compare_samples(samples, reference(), PixelFeatures()).metrics


def test_metrics_that_cannot_be_computed_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    without = reference(keep=0)
    assert set(compare_samples(images(30, 1), without, Classified()).metrics) <= {"frechet", "inception_score"}
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert set(compare_samples(images(30, 1), reference(), Classified()).metrics) == {"frechet", "precision", "recall"}
    for name, made, message in (
        ("kid", reference(), r"metrics='kid': .*pip install 'multistage-diffusion\[eval\]'"),
        ("precision-recall", without, "metrics='precision-recall': needs features of real images; .*--keep"),
        ("memorisation", reference(), "metrics='memorisation': needs real images, not statistics"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_samples(images(30, 1), made, Classified(), metrics=[name])


@pytest.mark.parametrize(
    ("samples", "keep", "message"),
    [
        (1, 0, "count=1: metric 'frechet' needs at least 2 images; give a larger"),
        (3, 9, "count=3: metric 'precision-recall' needs at least 4 images"),
        (
            9,
            3,
            "train of noise: features of 3 images are kept: metric 'precision-recall' needs at least 4 images; make",
        ),
    ],
)
def test_too_few_are_refused(samples: int, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        statistics_metrics((), PixelFeatures(), reference(keep), samples)
    with pytest.raises(ValueError, match=message):
        compare_samples(images(samples, 1), reference(keep), PixelFeatures())


def test_other_features_are_refused() -> None:
    made = reference(keep=0)
    smaller = dataclasses.replace(made, moments=dataclasses.replace(made.moments, mean=torch.zeros(3).double()))
    with pytest.raises(ValueError, match="4 and 3 feature dimensions"):
        compare_samples(images(30, 1), smaller, PixelFeatures())
