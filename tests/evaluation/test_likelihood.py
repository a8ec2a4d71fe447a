"""The bound, term by term, against closed forms."""

import math

import pytest
import torch
from densities import log_density

from multistage_diffusion.data import to_float
from multistage_diffusion.data.mixture import GaussianMixture
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation.likelihood import clipped_intervals, likelihood
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.stages import Stages

LOW, HIGH = 0.02, 50.0


class Wiener:
    """The exact denoiser of a centred Gaussian with variances (D,)."""

    def __init__(self, variances: torch.Tensor) -> None:
        self.variances = variances

    def __call__(self, x, sigma, cond=None):
        return x * self.variances / (self.variances + sigma.to(x).view(-1, *[1] * (x.ndim - 1)) ** 2)


def gaussian_diffusion(variances: torch.Tensor, low: float, high: float) -> float:
    """Return the diffusion term in nats per dimension: the sum of ½ ln[(v + a²)/a² · b²/(v + b²)] over dimensions."""
    terms = 0.5 * torch.log((variances + low**2) / low**2 * high**2 / (variances + high**2))
    return float(terms.mean())


def test_a_gaussian_is_exact_in_every_stage():
    variances = torch.tensor([4.0, 1.0, 0.25, 0.01], dtype=torch.float64)
    data = torch.randn(4000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * variances.sqrt()
    stages = Stages((0.3, 2.0))
    result = likelihood(Wiener(variances), data, stages, LOW, HIGH, pixels=False, draws=16).result()
    assert result.unit == "nats/dim"
    assert result.reconstruction is None
    for (low, high), found in zip(result.intervals, result.stages, strict=True):
        exact = gaussian_diffusion(variances, low, high)
        assert abs(found.mean - exact) < 4 * found.error
        assert found.error < 0.02 * exact
    assert result.diffusion.mean == pytest.approx(sum(s.mean for s in result.stages))
    assert result.prior.mean == pytest.approx(float(data.square().mean()) / (2 * HIGH**2))
    assert result.total.mean == pytest.approx(result.diffusion.mean + result.prior.mean)


@pytest.mark.slow
def test_a_mixture_gives_its_mutual_information():
    """I-MMSE (Guo et al. 2005): the term is I(y; z_low) - I(y; z_high), with I = h(z) - h(noise)."""
    mixture = GaussianMixture(
        torch.tensor([0.3, 0.7]), torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), torch.tensor([0.3, 0.6])
    )
    data = mixture.sample(10_000, seed=1)

    def information(sigma: float) -> torch.Tensor:
        noise = torch.randn(data.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        level = torch.full((len(data),), sigma, dtype=torch.float64)
        own = math.log(2 * math.pi * math.e * sigma**2)  # entropy of two dimensions of noise
        return -log_density(mixture, data + sigma * noise, level) - own

    found = likelihood(mixture, data, Stages((0.5,)), 0.1, 10.0, pixels=False, draws=8).result().diffusion
    exact = (information(0.1) - information(10.0)) / 2
    error = math.hypot(found.error, float(exact.std()) / math.sqrt(len(exact)))
    assert abs(found.mean - float(exact.mean())) < 3 * error


@pytest.mark.slow
def test_the_optimal_denoiser_knows_which_image_it_is():
    """Far below the distance of its images and up to high noise, the term is ln N: all that there is to know of one of them."""
    images, _ = open_data("digits").split(0)
    data = to_float(images.tensor())
    result = likelihood(
        OptimalDenoiser(data), data, Stages((0.5, 2.0)), 0.01, 1000.0, draws=8, batch=len(data)
    ).result()
    exact = math.log(len(data)) / (data[0].numel() * math.log(2))
    assert exact == pytest.approx(0.1689, abs=1e-4)
    assert abs(result.diffusion.mean - exact) < max(3 * result.diffusion.error, 0.01 * exact)


def test_the_reconstruction_is_the_softmax_over_levels():
    """At small noise a pixel is certain; at large noise of the levels' spacing it costs what a Gaussian over them does."""
    data = to_float(torch.randint(0, 256, (64, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))

    def reconstruction(sigma: float) -> float:
        terms = likelihood(Wiener(torch.ones(())), data, Stages(), sigma, 1.0, draws=1)
        assert terms.reconstruction is not None
        return float(terms.reconstruction.mean())

    assert reconstruction(1e-4) == pytest.approx(0.0, abs=1e-6)
    spacing = 2 / 255
    inner = data.abs() < 1 - 10 * spacing  # without the edge of the range the level's posterior is a discrete Gaussian
    terms = math.log(2 * spacing * math.sqrt(2 * math.pi * math.e) / spacing)
    assert inner.any()
    assert reconstruction(2 * spacing) == pytest.approx(terms, rel=0.03)


def test_rows_do_not_depend_on_the_batch_and_stages_add_up():
    variances = torch.ones(3)
    data = torch.randn(10, 3, generator=torch.Generator().manual_seed(3))
    one = likelihood(Wiener(variances), data, Stages((1.0,)), LOW, HIGH, pixels=False, draws=2, batch=10)
    other = likelihood(Wiener(variances), data, Stages((1.0,)), LOW, HIGH, pixels=False, draws=2, batch=3)
    assert torch.allclose(one.stages, other.stages, rtol=1e-5)
    assert torch.equal(one.total, one.stages.sum(0) + one.prior)


def test_stages_outside_the_range_are_left_out():
    assert clipped_intervals(Stages((0.01, 1.0, 80.0)), 0.1, 10.0) == {1: (0.1, 1.0), 2: (1.0, 10.0)}
    data = torch.ones(4, 2)
    found = likelihood(Wiener(torch.ones(2)), data, Stages((0.01, 1.0)), 0.1, 10.0, pixels=False).result()
    assert found.numbers == (2, 3)
    assert found.intervals == ((0.1, 1.0), (1.0, 10.0))


def test_labels_and_progress_are_handed_on():
    seen, told = [], []

    def denoiser(x, sigma, cond=None):
        seen.append(cond.labels)
        return torch.zeros_like(x)

    labels = torch.arange(6)
    likelihood(
        denoiser,
        torch.ones(6, 2),
        Stages(),
        LOW,
        HIGH,
        pixels=False,
        labels=labels,
        draws=1,
        batch=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert torch.equal(torch.cat(seen), labels)
    assert told == [(4, 6), (6, 6)]


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.0, 1.0), (0.1, math.inf), (math.nan, 1.0)])
def test_impossible_ranges_are_refused(low, high):
    with pytest.raises(UserError, match="sigma_min"):
        likelihood(Wiener(torch.ones(1)), torch.ones(2, 1), Stages(), low, high, pixels=False)


def test_one_image_is_too_few():
    with pytest.raises(UserError, match="at least 2"):
        likelihood(Wiener(torch.ones(1)), torch.ones(1, 1), Stages(), LOW, HIGH, pixels=False)
