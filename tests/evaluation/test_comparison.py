from __future__ import annotations

import dataclasses

import pytest
import torch

from multistage_diffusion.evaluation import comparison
from multistage_diffusion.evaluation.comparison import check_count, compare_samples
from multistage_diffusion.evaluation.features import PixelFeatures, extract
from multistage_diffusion.evaluation.metrics import frechet_distance, precision_recall
from multistage_diffusion.evaluation.reference import Reference, make_reference


def images(count: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 2, 2), generator=g, dtype=torch.uint8)


def reference(keep: int = 1000) -> Reference:
    return make_reference(PixelFeatures(), images(50, 0), data="noise", fingerprint="abc", part="train", keep=keep)


class Classified(PixelFeatures):
    name = "classified"

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :3] * 4


def test_every_number_is_the_metric_s() -> None:
    samples = images(30, 1)
    found = compare_samples(samples, reference(), PixelFeatures())
    fake, real = extract(PixelFeatures(), samples), extract(PixelFeatures(), images(50, 0))
    assert found.frechet == pytest.approx(frechet_distance(fake, real), rel=1e-12)
    kept = reference().features
    assert kept is not None
    assert (found.precision, found.recall) == precision_recall(kept[:30], fake, 3)
    assert (found.samples, found.reference_count, found.neighbour_count, found.k) == (30, 50, 30, 3)
    assert (found.dims, found.rank_deficient) == (4, False)
    assert found.reference == "train of noise"
    assert found.preprocessing == f"uint8 images of 1 x 2 x 2 (C x H x W): {PixelFeatures.preprocessing}"
    assert compare_samples(samples[:4], reference(), PixelFeatures()).rank_deficient


def test_scores_through_torch_fidelity_are_named_with_their_settings() -> None:
    kid = pytest.importorskip("torch_fidelity.metric_kid")
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    samples, kept = images(30, 1), reference().features
    assert kept is not None
    found = compare_samples(samples, reference(), Classified())
    fake = extract(PixelFeatures(), samples)
    expected = kid.kid_features_to_metric(
        fake.double(), kept.double(), kid_subsets=100, kid_subset_size=30, verbose=False
    )
    assert found.kid == pytest.approx(expected["kernel_inception_distance_mean"], rel=1e-9)
    assert (found.kid_subset, found.inception_splits) == (30, 10)
    score = isc.isc_features_to_metric(fake[:, :3] * 4, splits=10)
    assert found.inception_score == pytest.approx(score["inception_score_mean"], rel=1e-9)
    assert compare_samples(samples, reference(), PixelFeatures()).inception_score is None


def test_what_cannot_be_had_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    found = compare_samples(images(30, 1), reference(keep=0), Classified())
    assert (found.kid, found.precision, found.recall, found.k, found.neighbour_count) == (None,) * 5
    monkeypatch.setattr(comparison, "installed", lambda: False)
    found = compare_samples(images(30, 1), reference(), Classified())
    assert (found.kid, found.kid_subset, found.inception_score) == (None, None, None)
    assert found.precision is not None


@pytest.mark.parametrize(
    ("samples", "keep", "message"),
    [
        (3, 1000, "count=3: comparing with train of noise needs at least 4 samples"),
        (1, 0, "count=1: .* at least 2 samples"),
        (30, 2, "train of noise: keeps 2 features; precision and recall need more than k=3"),
    ],
)
def test_too_few_are_refused(samples: int, keep: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_count(samples, reference(keep), 3)
    with pytest.raises(ValueError, match=message):
        compare_samples(images(samples, 1), reference(keep), PixelFeatures())


def test_other_features_are_refused() -> None:
    made = reference(keep=0)
    smaller = dataclasses.replace(made, moments=dataclasses.replace(made.moments, mean=torch.zeros(3).double()))
    with pytest.raises(ValueError, match="4 and 3 feature dimensions"):
        compare_samples(images(30, 1), smaller, PixelFeatures())
