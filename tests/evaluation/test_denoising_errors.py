"""Errors of denoisers on the same noise, and what follows for the variational bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from multistage_diffusion.evaluation.denoising_errors import (
    bound_difference,
    denoising_errors,
    relative_differences,
)
from multistage_diffusion.evaluation.likelihood import likelihood
from multistage_diffusion.stages import Stages

DATA = torch.randn(60, 1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
SIGMAS = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)


def wiener(x: Tensor, sigma: Tensor, cond: object = None) -> Tensor:
    """The optimal denoiser of unit Gaussian data: x / (1 + sigma²)."""
    return x / (1 + sigma.view(-1, 1, 1, 1) ** 2)


def test_errors_are_the_squared_error_per_dimension_of_every_row() -> None:
    found = denoising_errors(wiener, DATA, SIGMAS, batch=7)
    assert found.shape == (3, 60)
    # of unit Gaussian data: sigma² / (1 + sigma²)
    expected = SIGMAS**2 / (1 + SIGMAS**2)
    torch.testing.assert_close(found.mean(1), expected, rtol=0.15, atol=0)
    zero = denoising_errors(lambda x, *_: torch.zeros_like(x), DATA, SIGMAS)
    torch.testing.assert_close(zero, DATA.square().flatten(1).mean(1).expand(3, -1))


def test_noise_does_not_depend_on_denoiser_batch_or_count() -> None:
    whole = denoising_errors(wiener, DATA, SIGMAS, batch=60)
    torch.testing.assert_close(denoising_errors(wiener, DATA, SIGMAS, batch=7), whole)
    torch.testing.assert_close(denoising_errors(wiener, DATA[:10], SIGMAS), whole[:, :10])
    assert not torch.equal(denoising_errors(wiener, DATA, SIGMAS, seed=1), whole)
    noise = [denoising_errors(lambda x, *_: x, DATA, SIGMAS) / SIGMAS[:, None] ** 2 for _ in range(2)]
    torch.testing.assert_close(noise[0], noise[1])
    assert not torch.allclose(noise[0][0], noise[0][1])  # another noise at every level


def test_labels_reach_the_denoiser() -> None:
    def by_label(x: Tensor, sigma: Tensor, cond: object) -> Tensor:
        return cond.labels.to(x).view(-1, 1, 1, 1).expand_as(x)  # type: ignore[attr-defined]

    zeros, labels = torch.zeros(5, 1, 2, 2), torch.arange(5)
    found = denoising_errors(by_label, zeros, SIGMAS[:1], labels=labels, batch=2)
    assert found[0].tolist() == [0, 1, 4, 9, 16]


def test_relative_differences_are_paired() -> None:
    base = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)
    (found,) = relative_differences(base * 0.5, base)
    assert found.mean == pytest.approx(-0.5)
    assert found.error == pytest.approx(0.5 / math.sqrt(3) / 2)  # rows differ by 0.5, 1.5 and 1
    (same,) = relative_differences(base, base)
    assert (same.mean, same.error) == (0, 0)
    (shifted,) = relative_differences(base - 0.2, base)
    assert shifted.error == pytest.approx(0, abs=1e-12)  # unpaired, it would be 0.6


def test_the_bound_differs_by_the_integral_of_the_errors() -> None:
    """Against the likelihood of the same two denoisers, drawn at other levels and noise."""
    worse = lambda x, sigma, cond=None: 0.9 * wiener(x, sigma)  # noqa: E731
    sigmas = torch.linspace(math.log(0.1), math.log(5.0), 25, dtype=torch.float64).exp()
    errors = [denoising_errors(d, DATA, sigmas) for d in (wiener, worse)]
    found = bound_difference(errors[1], errors[0], sigmas)
    totals = [likelihood(d, DATA, Stages(()), 0.1, 5.0, pixels=False, draws=25).stages.sum(0) for d in (wiener, worse)]
    exact = totals[1] - totals[0]
    assert found.mean == pytest.approx(float(exact.mean()), abs=3 * (found.error + float(exact.std()) / math.sqrt(60)))
    assert found.mean > 10 * found.error
