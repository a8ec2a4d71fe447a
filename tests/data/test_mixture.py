import math

import pytest
import torch
from densities import log_density

from multistage_diffusion.contracts import Denoiser
from multistage_diffusion.data.mixture import GaussianMixture

F64 = torch.float64


@pytest.fixture
def line():
    """Three components on a line, weights not normalised."""
    return GaussianMixture(
        torch.tensor([1.0, 2.0, 1.0], dtype=F64),
        torch.tensor([[-1.0], [0.2], [0.9]], dtype=F64),
        torch.tensor([0.1, 0.05, 0.3], dtype=F64),
    )


@pytest.fixture
def space():
    generator = torch.Generator().manual_seed(0)
    return GaussianMixture(
        torch.tensor([0.2, 0.5, 0.3]),
        torch.randn(3, 12, dtype=F64, generator=generator),
        torch.tensor([0.3, 0.6, 0.1]),
    )


def test_is_a_denoiser(line):
    assert isinstance(line, Denoiser)


@pytest.mark.parametrize("sigma", [0.05, 0.4, 3.0])
def test_posterior_mean_and_density_equal_numerical_integration(line, sigma):
    y = torch.linspace(-6, 6, 400_001, dtype=F64)
    weights, means, stds = line.weights, line.means[:, 0], line.stds
    density = (weights * torch.exp(-0.5 * ((y[:, None] - means) / stds) ** 2) / (stds * math.sqrt(2 * math.pi))).sum(1)
    x = torch.tensor([-1.3, -0.4, 0.1, 0.5, 2.0], dtype=F64)
    kernel = torch.exp(-0.5 * ((x[:, None] - y) / sigma) ** 2) / (sigma * math.sqrt(2 * math.pi))
    evidence = torch.trapezoid(kernel * density, y)
    mean = torch.trapezoid(kernel * density * y, y) / evidence
    level = torch.full((5,), sigma, dtype=F64)
    torch.testing.assert_close(line(x[:, None], level)[:, 0], mean, rtol=0, atol=1e-9)
    torch.testing.assert_close(log_density(line, x[:, None], level), evidence.log(), rtol=0, atol=1e-9)


def test_tweedie_formula_per_row(space):
    generator = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.02, 0.3, 1.0, 10.0], dtype=F64)
    x = space.sample(4, 0) + sigma[:, None] * torch.randn(4, 12, dtype=F64, generator=generator)
    score = torch.empty_like(x)
    for i in range(12):
        step = torch.zeros(12, dtype=F64)
        step[i] = 1e-5
        score[:, i] = (log_density(space, x + step, sigma) - log_density(space, x - step, sigma)) / 2e-5
    torch.testing.assert_close(space(x, sigma), x + sigma[:, None] ** 2 * score, rtol=1e-7, atol=1e-7)


def test_images_equal_flat_rows_and_the_type_is_kept(space):
    sigma = torch.tensor([0.3, 2.0])
    x = torch.randn(2, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    images = space(x, sigma)
    assert images.shape == x.shape
    assert images.dtype == torch.float32
    torch.testing.assert_close(images.flatten(1), space(x.flatten(1), sigma), rtol=0, atol=0)
    assert space(x.bfloat16(), sigma).dtype == torch.bfloat16


def test_one_sigma_as_a_number_gives_the_same_as_in_every_row(space):
    x = space.sample(4, 0)
    rows = torch.full((4,), 1 / 3, dtype=F64)
    assert torch.equal(space(x, 1 / 3), space(x, rows))


def test_limits(space):
    x = space.sample(5, 0)
    torch.testing.assert_close(space(x, torch.zeros(5)), x)
    mean = (space.weights[:, None] * space.means).sum(0)
    torch.testing.assert_close(space(x, torch.full((5,), 1e6)), mean.expand(5, -1), rtol=0, atol=1e-4)


def test_far_points_do_not_underflow(line):
    x = torch.tensor([[500.0], [-500.0]], dtype=F64)
    sigma = torch.full((2,), 0.01, dtype=F64)
    assert bool(torch.isfinite(line(x, sigma)).all())
    # out there the widest component (sd 0.3, mean 0.9) is all that counts
    expected = 0.9 + 0.09 / (0.09 + 1e-4) * (x - 0.9)
    torch.testing.assert_close(line(x, sigma), expected)


def test_samples_follow_the_density(line):
    points = line.sample(10_000, 3)[:, 0]
    mean = (line.weights * line.means[:, 0]).sum()
    variance = (line.weights * (line.stds**2 + line.means[:, 0] ** 2)).sum() - mean**2
    assert abs(float(points.mean() - mean)) < 5 * float(variance.sqrt()) / 100
    assert abs(float(points.var() / variance) - 1) < 0.06
    grid = torch.linspace(-2, 2, 41, dtype=F64)
    cdf = (line.weights * torch.special.ndtr((grid[:, None] - line.means[:, 0]) / line.stds)).sum(1)
    empirical = (points[None] < grid[:, None]).double().mean(1)
    assert float((cdf - empirical).abs().max()) < 1.95 / 100  # Kolmogorov-Smirnov, p = 0.001


def test_samples_depend_on_their_number_and_the_seed_alone(space):
    assert torch.equal(space.sample(10, 4)[:6], space.sample(6, 4))
    assert not torch.equal(space.sample(6, 4), space.sample(6, 5))
    assert space.sample(6, 4).shape == (6, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"means": torch.zeros(2)}, r"means of shape \(2,\) must be \(J, D\)"),
        ({"weights": torch.ones(3)}, r"weights of shape \(3,\) must be \(2,\)"),
        ({"stds": torch.ones(2, 2)}, r"stds of shape \(2, 2\) must be \(2,\)"),
        ({"stds": torch.tensor([1.0, 0.0])}, r"stds=\[1\.0, 0\.0\] must be positive"),
        ({"weights": torch.tensor([1.0, -1.0])}, r"weights=\[1\.0, -1\.0\] must be positive"),
        ({"weights": torch.tensor([1.0, torch.nan])}, "must be positive and finite"),
    ],
)
def test_refuses(change, message):
    good = {"weights": torch.ones(2), "means": torch.zeros(2, 3), "stds": torch.ones(2)}
    with pytest.raises(ValueError, match=message):
        GaussianMixture(**(good | change))


def test_refuses_rows_of_another_length(space):
    with pytest.raises(ValueError, match=r"x of shape \(2, 3\) must have 12 values per row"):
        space(torch.zeros(2, 3), torch.ones(2))
