from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation.frechet import frechet_distance
from multistage_diffusion.evaluation.held_out import _Draws, evaluate_samples, held_out_metrics
from multistage_diffusion.evaluation.memorisation import memorisation
from multistage_diffusion.evaluation.pixels import PixelFeatures
from multistage_diffusion.evaluation.precision_recall import precision_recall
from multistage_diffusion.evaluation.result import read_result


def images(count: int, seed: int, size: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, size, size), generator=g, dtype=torch.uint8)


def test_evaluation_names_its_conditions_and_is_json() -> None:
    result = evaluate_samples(images(60, 5), images(90, 6), images(40, 7), PixelFeatures(), splits=2)
    data = json.loads(json.dumps(to_dict(result)))
    assert data["extractor"] == "pixels"
    assert "not comparable with Inception FID" in data["comparable_to"]
    assert "1 x 4 x 4" in data["preprocessing"]
    counts = ("samples", "training_count", "reference_count", "count", "dims", "splits")
    assert [data[key] for key in counts] == [60, 90, 40, 40, 16, 2]
    assert data["metrics"]["recall"]["settings"] == {"k": 3, "images": 40}
    assert (data["rank_deficient"], data["against"]) == (False, "held-out")
    assert read_result(data) == result
    found = result.metrics["frechet"]
    assert found.real is not None
    assert 0.7 < found.value / found.real < 1.4  # samples from the same distribution as the real images


def test_evaluation_is_the_mean_of_the_metrics_over_equal_counts() -> None:
    """With every set drawn whole the order of a draw cannot matter."""
    samples, train, held_out = images(30, 8) // 2, images(30, 9), images(30, 10)
    result = evaluate_samples(samples, train, held_out, PixelFeatures(), splits=3)
    fake, other, real = (PixelFeatures()(i) for i in (samples, train, held_out))
    found = result.metrics
    assert found["frechet"].value == pytest.approx(frechet_distance(fake, real), rel=1e-9)
    assert found["frechet"].real == pytest.approx(frechet_distance(other, real), rel=1e-9)
    values = (found["precision"], found["recall"])
    assert [v.value for v in values] == pytest.approx(precision_recall(real, fake))
    assert [v.real for v in values] == pytest.approx(precision_recall(real, other))
    assert found["frechet"].value > 1.3 * found["frechet"].real
    copies = memorisation(samples, train, held_out)
    assert (found["memorised"].value, found["memorised"].real) == (copies.share, copies.held_out_share)


def test_reconstructions_are_measured_beside_training_images() -> None:
    samples, train, held_out = images(30, 8), images(30, 9), images(30, 10)
    blurred = held_out // 2
    result = evaluate_samples(samples, train, held_out, PixelFeatures(), splits=2, reconstructed=blurred)
    expected = frechet_distance(PixelFeatures()(blurred), PixelFeatures()(train))
    found = result.metrics["frechet_reconstructed"]
    assert (found.value, found.real) == (pytest.approx(expected, rel=1e-9), None)
    plain = evaluate_samples(samples, train, held_out, PixelFeatures(), splits=2)
    assert plain.metrics == {name: value for name, value in result.metrics.items() if name != "frechet_reconstructed"}


def test_evaluation_draws_follow_the_seed() -> None:
    sets = images(60, 11), images(60, 12), images(60, 13)
    one, same, other = (evaluate_samples(*sets, PixelFeatures(), count=12, splits=1, seed=s) for s in (0, 0, 1))
    assert one == same
    assert one.metrics["frechet"].value != other.metrics["frechet"].value
    assert one.rank_deficient  # 12 images, 16 dimensions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": images(9, 0, size=5)}, r"samples: images of shape \(1, 5, 5\), training \(1, 4, 4\)"),
        ({"held_out": images(9, 0).float()}, "held_out: expected non-empty uint8"),
        (
            {"held_out": images(3, 0), "metrics": ["precision-recall"]},
            "3 held-out images: metric 'precision-recall' needs at least 4 images; give",
        ),
        ({"count": 3}, "count=3: metric 'precision-recall' needs at least 4 images; give"),
        ({"count": 21}, r"count=21 must be between 1 and 20, .* smallest set \(20 samples, 20 training and 20"),
        ({"splits": 0}, "splits=0 must be at least 1"),
        ({"metrics": ["fid"]}, "metrics='fid' must be one of frechet"),
        ({"metrics": ["kid"]}, "metrics='kid': is computed against statistics only"),
        ({"metrics": ["frechet-reconstructed"]}, "metrics='frechet-reconstructed': needs a run on latents"),
    ],
)
def test_evaluation_refuses(change: dict[str, object], message: str) -> None:
    arguments = {"samples": images(20, 1), "train": images(20, 2), "held_out": images(20, 3)} | change
    with pytest.raises(ValueError, match=message):
        evaluate_samples(extractor=PixelFeatures(), **arguments)  # type: ignore[arg-type]


def test_features_that_are_not_finite_are_refused() -> None:
    class Broken(PixelFeatures):
        def __call__(self, images: Tensor) -> Tensor:
            return super().__call__(images) * math.inf

    with pytest.raises(ValueError, match="features of 9 of 9 images hold NaN or infinity"):
        evaluate_samples(images(9, 0), images(9, 1), images(9, 2), Broken())


def test_features_of_draws_are_their_images_and_no_other_is_looked_at():
    images, seen = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2), []

    class Pixels(PixelFeatures):
        def __call__(self, batch):
            seen.extend(batch[:, 0, 0, 0].tolist())
            return super().__call__(batch)

    drawn = _Draws(images, None, "samples", (3, 2, 0), Pixels(), "cpu")
    assert seen == []
    for split, rows in enumerate(drawn.rows):
        found = drawn.drawn(split)
        assert torch.equal(found.images, images[rows])
        assert torch.equal(found.features, PixelFeatures()(images[rows]))
    used = {int(4 * row) for rows in drawn.rows for row in rows}
    assert 3 <= len(used) < 6  # the draws overlap
    assert sorted(seen) == sorted(used)


def test_named_metrics_alone_are_computed() -> None:
    class Unused(PixelFeatures):
        def __call__(self, images: Tensor) -> Tensor:
            assert len(images) == 1  # the black image that tells the dimensions
            return super().__call__(images)

    sets = images(9, 1), images(9, 2), images(9, 3)
    result = evaluate_samples(*sets, Unused(), metrics=["memorisation"])
    assert list(result.metrics) == ["memorised"]
    assert list(evaluate_samples(*sets, PixelFeatures(), metrics=["frechet"], count=2).metrics) == ["frechet"]


def test_a_metric_that_few_images_do_not_allow_is_left_out_unless_named() -> None:
    extractor = PixelFeatures()
    counts = {"samples": 500, "train": 58, "held-out": 2}
    with pytest.warns(
        UserWarning, match="2 held-out images: metric 'precision-recall' needs at least 4 and is left out"
    ):
        chosen = held_out_metrics((), extractor, counts)
    assert "frechet" in chosen
    assert "precision-recall" not in chosen
    with pytest.raises(
        UserError, match=r"2 held-out images: metric 'precision-recall' needs at least 4 .*data\.held_out"
    ):
        held_out_metrics(("precision-recall",), extractor, counts)
    with pytest.raises(
        UserError, match=r"^count=3: metric 'precision-recall' needs at least 4 images; give a larger count$"
    ):
        held_out_metrics(("precision-recall",), extractor, counts | {"samples": 3, "held-out": 50})


def test_progress_is_told_of_every_set():
    told = []
    evaluate_samples(
        images(60, 5), images(90, 6), images(40, 7), PixelFeatures(), splits=2, progress=lambda *done: told.append(done)
    )
    ends = [done for done, total in told if done == total]
    assert len(ends) == 3
    assert all(40 <= end <= 60 for end in ends)
