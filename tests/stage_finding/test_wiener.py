"""The Wiener denoiser against the closed form for Gaussian data."""

from __future__ import annotations

import torch

from multistage_diffusion.stage_finding.wiener import WienerDenoiser


def gaussian(count: int, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images of a Gaussian (count, D), its mean and its eigenvectors as columns."""
    draws = torch.Generator().manual_seed(0)
    mean = torch.randn(len(values), generator=draws, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=draws, dtype=torch.float64)).Q
    noise = torch.randn(count, len(values), generator=draws, dtype=torch.float64)
    return mean + noise * values.sqrt() @ basis.T, mean, basis


def test_it_is_the_posterior_mean_of_a_gaussian_with_the_sample_s_mean_and_covariance() -> None:
    images, _, _ = gaussian(50, torch.logspace(1, -2, 12, dtype=torch.float64))
    x = torch.randn(7, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sigma = torch.tensor([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0], dtype=torch.float64)
    found = WienerDenoiser(images.reshape(50, 1, 3, 4))(x.reshape(7, 1, 3, 4), sigma)
    mean, covariance = images.mean(0), torch.cov(images.T)
    for row, (one, s) in enumerate(zip(x, sigma, strict=True)):
        gain = covariance @ torch.linalg.inv(covariance + s**2 * torch.eye(12, dtype=torch.float64))
        torch.testing.assert_close(found[row].flatten(), mean + gain @ (one - mean), rtol=1e-9, atol=1e-9)
    assert found.shape == (7, 1, 3, 4)
    torch.testing.assert_close(WienerDenoiser(images)(x[:1], 0.01), found[:1].reshape(1, 12), rtol=1e-12, atol=1e-12)


def test_directions_that_few_images_do_not_show_are_not_taken_for_empty() -> None:
    # a power law of which 30 images show 29 of 120 directions: their own covariance would answer the mean in the others
    values = torch.arange(1, 121, dtype=torch.float64) ** -1.0
    images, mean, basis = gaussian(30, values)
    fresh = gaussian(2030, values)[0][30:]
    noisy = fresh + 0.1 * torch.randn(fresh.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = WienerDenoiser(images)(noisy, 0.1)
    best = mean + (noisy - mean) @ basis * (values / (values + 0.01)) @ basis.T
    own = torch.cov(images.T)
    blind = images.mean(0) + (noisy - images.mean(0)) @ own @ torch.linalg.inv(own + 0.01 * torch.eye(120))
    error, least, without = (float(((answer - fresh) ** 2).mean()) for answer in (found, best, blind))
    assert least < error < 1.6 * least
    assert without > 2 * error


def test_dtype_and_float_sigma_are_kept() -> None:
    denoiser = WienerDenoiser(gaussian(40, torch.ones(5, dtype=torch.float64))[0].float())
    assert denoiser(torch.zeros(2, 5), 1.0).dtype == torch.float32
    far = denoiser(torch.zeros(2, 5), 1e9)
    torch.testing.assert_close(far.double(), denoiser.mean.expand(2, 5), rtol=1e-6, atol=1e-6)
