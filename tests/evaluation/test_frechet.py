from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from multistage_diffusion.evaluation.frechet import frechet_between, frechet_distance
from multistage_diffusion.evaluation.moments import MAX_DIMS, Moments, moments


def gauss(rows: int, dims: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, dims, generator=g, dtype=torch.float64)


def correlated(rows: int, dims: int, seed: int) -> Tensor:
    return gauss(rows, dims, seed) @ gauss(dims, dims, seed + 100) + gauss(1, dims, seed + 200)


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


def test_the_distance_of_moments_is_that_of_their_correlated() -> None:
    a, b = correlated(40, 3, 2), correlated(60, 3, 3)
    assert frechet_between(moments(a), moments(b)) == pytest.approx(frechet_distance(a, b), rel=1e-12)
    shifted = Moments(mean=moments(a).mean + 2.0, covariance=moments(a).covariance, count=40)
    assert frechet_between(moments(a), shifted) == pytest.approx(3 * 2.0**2, rel=1e-9)


def test_moments_that_do_not_fit_are_refused() -> None:
    a, b = moments(correlated(9, 3, 4)), moments(correlated(9, 2, 5))
    with pytest.raises(ValueError, match="3 and 2 feature dimensions; use the same features"):
        frechet_between(a, b)
    broken = Moments(mean=a.mean, covariance=a.covariance * torch.nan, count=9)
    with pytest.raises(ValueError, match="not all finite"):
        frechet_between(a, broken)
