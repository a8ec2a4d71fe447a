import dataclasses
import json
import math

import pytest
import torch
from torch import Tensor

from multistage_diffusion.config.serialization import to_dict
from multistage_diffusion.evaluation import metrics
from multistage_diffusion.evaluation.features import PixelFeatures
from multistage_diffusion.evaluation.metrics import (
    evaluate_samples,
    frechet_distance,
    memorisation,
    nearest,
    precision_recall,
)
from multistage_diffusion.evaluation.statistics import MAX_DIMS


def gauss(rows: int, dims: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dims, generator=g, dtype=torch.float64)


def correlated(rows: int, dims: int, seed: int) -> Tensor:
    return gauss(rows, dims, seed) @ gauss(dims, dims, seed + 100) + gauss(1, dims, seed + 200)


def images(count: int, seed: int, size: int = 4) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, size, size), generator=g, dtype=torch.uint8)


def whitened(rows: int, dims: int, seed: int) -> Tensor:
    """Features whose sample mean is 0 and unbiased sample covariance the identity, to rounding."""
    x = gauss(rows, dims, seed)
    q, _ = torch.linalg.qr(x - x.mean(dim=0))
    return q * math.sqrt(rows - 1)


def test_frechet_of_diagonal_gaussians_is_the_closed_form() -> None:
    sd_a, sd_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 0.1, 0.5]).double()
    mean = torch.tensor([1.0, -2.0, 0.0]).double()
    a, b = whitened(50, 3, 0) * sd_a, whitened(70, 3, 1) * sd_b + mean
    expected = float(mean.square().sum() + (sd_a - sd_b).square().sum())
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_equals_the_eigenvalues_of_the_product_of_covariances() -> None:
    a, b = correlated(60, 6, 2), correlated(80, 6, 3)
    eigenvalues = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T))  # similar to the symmetric product
    expected = (a.mean(0) - b.mean(0)).square().sum() + torch.cov(a.T).trace() + torch.cov(b.T).trace()
    expected -= 2 * eigenvalues.sqrt().real.sum()
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-9)


def test_frechet_of_singular_covariances_equals_the_nuclear_norm() -> None:
    """tr (C_a^1/2 C_b C_a^1/2)^1/2 is the sum of singular values of X_a X_b^T / sqrt((n - 1)(m - 1)), X centred."""
    a, b = correlated(7, 20, 4), correlated(9, 20, 5)
    x, y = a - a.mean(0), b - b.mean(0)
    cross = torch.linalg.svdvals(x @ y.T).sum() / math.sqrt(6 * 8)
    expected = (a.mean(0) - b.mean(0)).square().sum() + x.square().sum() / 6 + y.square().sum() / 8 - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(float(expected), rel=1e-6)


def test_frechet_invariances() -> None:
    a, b = correlated(40, 5, 6), correlated(50, 5, 7)
    distance = frechet_distance(a, b)
    rotation, _ = torch.linalg.qr(gauss(5, 5, 8))
    assert frechet_distance(b, a) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(a @ rotation + 3, b @ rotation + 3) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(2 * a, 2 * b) == pytest.approx(4 * distance, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6 * float(torch.cov(a.T).trace()))
    assert frechet_distance(a, a) >= 0
    assert frechet_distance(a, a + 2) == pytest.approx(4 * 5, rel=1e-6)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.zeros(1, 3), torch.zeros(5, 3), "N >= 2"),
        (torch.zeros(5, 3), torch.zeros(5, 4), "3 and 4 dimensions"),
        (torch.zeros(5, 3), torch.full((5, 3), math.nan), "5 of 5 rows hold NaN"),
        (torch.zeros(2, MAX_DIMS + 1), torch.zeros(2, MAX_DIMS + 1), "4097 feature dimensions exceed 4096"),
    ],
)
def test_frechet_refuses(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frechet_distance(a, b)


def brute_coverage(points: Tensor, centres: Tensor, k: int) -> float:
    radii = []
    for i, c in enumerate(centres):
        others = sorted(math.dist(c.tolist(), o.tolist()) for j, o in enumerate(centres) if j != i)
        radii.append(others[k - 1])
    inside = [any(math.dist(p.tolist(), c.tolist()) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
    return sum(inside) / len(points)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [7, 1024])
def test_precision_recall_equal_the_loop(k: int, chunk: int) -> None:
    real, fake = gauss(40, 3, 9), 0.7 * gauss(30, 3, 10) + 0.8
    expected = brute_coverage(fake, real, k), brute_coverage(real, fake, k)
    assert 0 < expected[0] < 1  # otherwise the comparison shows little
    assert 0 < expected[1] < 1
    assert expected[0] != expected[1]
    assert precision_recall(real, fake, k, chunk) == expected


def test_precision_recall_limits() -> None:
    a = gauss(50, 4, 11)
    assert precision_recall(a, a[torch.randperm(50)]) == (1.0, 1.0)
    assert precision_recall(a, a + 100) == (0.0, 0.0)
    assert precision_recall(a, a[:5]) == (1.0, brute_coverage(a, a[:5], 3))  # collapsed onto five real images


def test_balls_are_closed_and_may_have_no_radius() -> None:
    """Four equal points have balls of radius 0 that hold an equal point; a point on a rim is inside."""
    same = (gauss(1, 50, 12) * 10).expand(4, 50)
    assert precision_recall(same, same.clone()) == (1.0, 1.0)
    line = torch.tensor([[0.0], [0.1], [0.3]], dtype=torch.float64)  # k = 1: radii 0.1, 0.1, 0.2
    fake = torch.tensor([[0.5], [-0.1], [0.51], [9.0]], dtype=torch.float64)
    assert precision_recall(line, fake, 1)[0] == 0.5


@pytest.mark.parametrize("k", [0, 5])
def test_precision_recall_refuses_k(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} must be at least 1 and below .* \(9 real, 5 fake\)"):
        precision_recall(gauss(9, 2, 0), gauss(5, 2, 1), k)


@pytest.mark.parametrize("chunk", [3, 8, 1024])
def test_nearest_equals_the_loop_and_takes_the_first_of_equals(chunk: int) -> None:
    a, b = gauss(20, 5, 13), gauss(17, 5, 14)
    b[11] = b[4]
    a[0] = b[4]
    distance, index = nearest(a, b, chunk)
    loop = torch.stack([torch.stack([(x - y).norm() for y in b]) for x in a])
    torch.testing.assert_close(distance, loop.min(dim=1).values, rtol=1e-9, atol=1e-9)
    assert torch.equal(index, loop.argmin(dim=1))
    assert (float(distance[0]), int(index[0])) == (0.0, 4)


def test_memorisation_finds_planted_copies() -> None:
    train, held_out, fresh = images(200, 0), images(100, 1), images(30, 2)
    samples = torch.cat([fresh, train[[7, 150, 3]]])
    result = memorisation(samples, train, held_out)
    assert result.index[30:].tolist() == [7, 150, 3]
    assert result.distance[30:].tolist() == [0.0, 0.0, 0.0]
    pixels = PixelFeatures()
    own = torch.cdist(pixels(held_out).double(), pixels(train).double()).min(dim=1).values
    assert result.threshold == pytest.approx(float(torch.quantile(own, 0.05)), rel=1e-9)
    assert result.held_out_share == pytest.approx(0.05)
    assert result.share == pytest.approx((3 + float((result.distance[:30] <= result.threshold).sum())) / 33)
    assert result.share < 0.5


def test_memorisation_of_copies_only_and_of_held_out_images_that_are_copies() -> None:
    train, held_out = images(50, 3), images(40, 4)
    assert memorisation(train[:10], train, held_out).share == 1.0
    duplicated = memorisation(train[:10], train, train)  # threshold 0: a copy is a copy all the same
    assert (duplicated.threshold, duplicated.share, duplicated.held_out_share) == (0.0, 1.0, 1.0)


def test_evaluation_names_its_conditions_and_is_json() -> None:
    result = evaluate_samples(images(60, 5), images(90, 6), images(40, 7), PixelFeatures(), splits=2)
    data = json.loads(json.dumps(to_dict(result)))
    assert data["extractor"] == "pixels"
    assert "not comparable with Inception FID" in data["comparable_to"]
    assert "1 x 4 x 4" in data["preprocessing"]
    assert [data[key] for key in ("samples", "train", "held_out", "count", "dims", "k")] == [60, 90, 40, 40, 16, 3]
    assert data["rank_deficient"] is False
    assert 0.7 < result.frechet / result.frechet_real < 1.4  # samples from the same distribution as the real images


def test_evaluation_is_the_mean_of_the_metrics_over_equal_counts() -> None:
    """With every set drawn whole the order of a draw cannot matter."""
    samples, train, held_out = images(30, 8) // 2, images(30, 9), images(30, 10)
    result = evaluate_samples(samples, train, held_out, PixelFeatures(), k=2, splits=3)
    fake, other, real = (PixelFeatures()(i) for i in (samples, train, held_out))
    assert result.frechet == pytest.approx(frechet_distance(fake, real), rel=1e-9)
    assert result.frechet_real == pytest.approx(frechet_distance(other, real), rel=1e-9)
    assert (result.precision, result.recall) == pytest.approx(precision_recall(real, fake, 2))
    assert (result.precision_real, result.recall_real) == pytest.approx(precision_recall(real, other, 2))
    assert result.frechet > 1.3 * result.frechet_real
    assert result.memorised == memorisation(samples, train, held_out).share


def test_reconstructions_are_measured_beside_training_images() -> None:
    samples, train, held_out = images(30, 8), images(30, 9), images(30, 10)
    blurred = held_out // 2
    result = evaluate_samples(samples, train, held_out, PixelFeatures(), splits=2, reconstructed=blurred)
    expected = frechet_distance(PixelFeatures()(blurred), PixelFeatures()(train))
    assert result.frechet_reconstructed == pytest.approx(expected, rel=1e-9)
    plain = evaluate_samples(samples, train, held_out, PixelFeatures(), splits=2)
    assert plain.frechet_reconstructed is None
    assert plain == dataclasses.replace(result, frechet_reconstructed=None)


def test_evaluation_draws_follow_the_seed() -> None:
    sets = images(60, 11), images(60, 12), images(60, 13)
    one, same, other = (evaluate_samples(*sets, PixelFeatures(), count=12, splits=1, seed=s) for s in (0, 0, 1))
    assert one == same
    assert one.frechet != other.frechet
    assert one.rank_deficient  # 12 images, 16 dimensions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": images(9, 0, size=5)}, r"samples: images of shape \(1, 5, 5\), training \(1, 4, 4\)"),
        ({"held_out": images(9, 0).float()}, "held_out: expected non-empty uint8"),
        ({"held_out": images(3, 0)}, "count=3 must be above k=3"),
        ({"count": 21}, "count=21 must be above k=3 and at most 20"),
        ({"splits": 0}, "splits=0 must be at least 1"),
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

    with pytest.raises(ValueError, match="rows hold NaN or infinity"):
        evaluate_samples(images(9, 0), images(9, 1), images(9, 2), Broken())


def test_features_of_draws_are_their_images_and_no_other_is_looked_at():
    images, seen = torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2), []

    class Pixels(PixelFeatures):
        def __call__(self, batch):
            seen.extend(batch[:, 0, 0, 0].tolist())
            return super().__call__(batch)

    draws = [torch.tensor([7, 2, 5]), torch.tensor([2, 9])]
    found = metrics._extract_drawn(Pixels(), images, draws, device="cpu")
    for features, draw in zip(found, draws, strict=True):
        assert torch.equal(features, PixelFeatures()(images[draw]))
    assert sorted(seen) == [8, 20, 28, 36]
