"""Stages by the Wiener denoiser, against Monte Carlo, closed forms and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from multistage_diffusion.errors import UserError
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.stage_finding.gaussian import (
    Moments,
    Spectrum,
    bootstrap_edges,
    cluster,
    density_levels,
    edges_between,
    gaussian_edges,
    measure_moments,
    output_distances,
    propose_density,
    with_tail,
)

PRIOR = LogNormal(p_mean=-1.2, p_std=1.2)


def edm(data: float = 0.5):
    return lambda s: (data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt())


def vp_eps(sigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ones_like(sigma), -sigma


def gaussian_images(count: int, values: Tensor, mean: Tensor, seed: int = 0) -> Tensor:
    """Draw images of a Gaussian with these eigenvalues in a random basis."""
    draws = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=draws, dtype=torch.float64)).Q
    return mean + torch.randn(count, len(values), generator=draws, dtype=torch.float64) * values.sqrt() @ basis.T


@pytest.mark.parametrize("output", [edm(0.7), vp_eps])
def test_the_distance_is_that_of_a_monte_carlo_of_the_wiener_denoiser(output) -> None:
    dim, count = 6, 200_000
    values = torch.logspace(0.5, -2, dim, dtype=torch.float64)
    mean = torch.linspace(-1, 1, dim, dtype=torch.float64)
    draws = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=draws, dtype=torch.float64)).Q
    y = mean + torch.randn(count, dim, generator=draws, dtype=torch.float64) * values.sqrt() @ basis.T
    noise = torch.randn(count, dim, generator=draws, dtype=torch.float64)
    sigma = torch.tensor([0.05, 0.4, 3.0], dtype=torch.float64)
    outputs = []
    for s, skip, out in zip(sigma, *output(sigma), strict=True):
        x = y + s * noise
        denoised = mean + (x - mean) @ basis * (values / (values + s**2)) @ basis.T
        outputs.append((denoised - skip * x) / out)
    found = output_distances(Spectrum(values, float(mean @ mean)), sigma, output)
    for a, b in itertools.combinations(range(3), 2):
        each = ((outputs[a] - outputs[b]) ** 2).mean(1)
        error = float(each.std()) / math.sqrt(count)
        assert abs(float(found[a, b] - each.mean())) < 4 * error
        assert found[a, b] == found[b, a]
    assert not found.diagonal().any()


def test_the_wiener_denoiser_of_a_gaussian_is_its_optimal_denoiser_so_white_data_have_one_stage() -> None:
    # white data of standard deviation sigma_data: F = 0 at every noise level, so nothing changes
    white = Spectrum(torch.full((8,), 0.25, dtype=torch.float64), 0.0)
    assert float(output_distances(white, density_levels(PRIOR), edm(0.5)).max()) < 1e-20


def test_many_coordinates_are_added_in_pieces() -> None:
    values = torch.logspace(1, -6, 9000, dtype=torch.float64)
    sigma = density_levels(PRIOR, 7)
    skip, out = edm()(sigma)
    f = (values / (values + sigma[:, None] ** 2) - skip[:, None]) / out[:, None]
    rows = torch.cat([values.sqrt() * f, sigma[:, None] * f], dim=1)
    expected = ((rows[:, None] - rows[None]) ** 2).sum(2) / 9000
    torch.testing.assert_close(output_distances(Spectrum(values, 0.0), sigma, edm()), expected, rtol=1e-10, atol=1e-14)


def test_groups_are_the_best_of_all_in_the_sense_of_k_means() -> None:
    points = torch.randn(11, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).cumsum(0)
    distances = torch.cdist(points, points) ** 2

    def cost(cuts: tuple[int, ...]) -> float:
        groups = [points[a:b] for a, b in itertools.pairwise((0, *cuts, 11))]
        return sum(2 * float(((g - g.mean(0)) ** 2).sum()) for g in groups)

    for stages, (cuts, value) in enumerate(cluster(distances, 4), start=1):
        best = min(itertools.combinations(range(1, 11), stages - 1), key=cost)
        assert cuts == best
        assert value == pytest.approx(cost(best), rel=1e-9)


def test_levels_are_quantiles_of_the_density_so_shares_are_counted() -> None:
    sigma = density_levels(PRIOR, 100)
    (edge,) = edges_between(sigma, (40,))
    assert sigma[39] < edge < sigma[40]
    assert PRIOR.mass(0.0, edge) == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("shape", [(40, 3, 4, 5), (400, 1, 3, 4)])
def test_moments_are_those_of_the_covariance_by_either_route(shape: tuple[int, ...]) -> None:
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.1
    rows = images.flatten(1).double()
    found = measure_moments(images)
    expected = torch.linalg.svdvals(rows - rows.mean(0)) ** 2 / (len(rows) - 1)
    rank = min(len(rows) - 1, rows.shape[1])
    torch.testing.assert_close(found.values, expected[:rank], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.squares.sum(0) / (len(rows) - 1), found.values, rtol=1e-9, atol=1e-12)
    assert found.mean_square == pytest.approx(float((rows.mean(0) ** 2).sum()), rel=1e-9)
    assert found.dim == rows.shape[1]


def test_equal_weights_change_nothing() -> None:
    found = measure_moments(torch.randn(50, 200, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(
        found.spectrum(torch.ones(50, dtype=torch.float64)).values, found.spectrum().values, rtol=1e-9, atol=0.0
    )


def test_a_power_law_is_continued() -> None:
    law = 3.0 * torch.arange(1, 101, dtype=torch.float64) ** -1.7
    torch.testing.assert_close(with_tail(law[:39], 40, 100), law, rtol=1e-9, atol=0.0)


def test_a_subspace_that_the_images_fill_has_no_tail() -> None:
    values = torch.cat([torch.ones(5, dtype=torch.float64), torch.zeros(34, dtype=torch.float64)])
    assert with_tail(values, 40, 100).sum() == 5


def test_enough_images_need_no_tail() -> None:
    values = torch.arange(10, 0, -1, dtype=torch.float64)
    assert torch.equal(with_tail(values, 200, 10), values)


def test_few_images_give_the_edges_of_many() -> None:
    dim = 96
    values = 2.0 * torch.arange(1, dim + 1, dtype=torch.float64) ** -1.5
    mean = torch.full((dim,), -0.4, dtype=torch.float64)
    images = gaussian_images(20 * dim, values, mean)
    many = gaussian_edges(measure_moments(images).spectrum(), PRIOR, edm(), 3)
    truth = gaussian_edges(Spectrum(values, float(mean @ mean)), PRIOR, edm(), 3)
    np.testing.assert_allclose(many, truth, rtol=0.02)
    for part in range(4):
        few = gaussian_edges(measure_moments(images[part * 32 :][:32]).spectrum(), PRIOR, edm(), 3)
        np.testing.assert_allclose(few, many, rtol=0.05)


def test_the_bootstrap_s_spread_is_that_of_fresh_images() -> None:
    dim, count = 24, 200
    values = 2.0 * torch.arange(1, dim + 1, dtype=torch.float64) ** -1.5
    mean = torch.zeros(dim, dtype=torch.float64)
    images = gaussian_images(40 * count, values, mean, seed=5)
    fresh = [
        gaussian_edges(measure_moments(images[i * count :][:count]).spectrum(), PRIOR, edm(), 2) for i in range(40)
    ]
    found = bootstrap_edges(measure_moments(images[:count]), PRIOR, edm(), 2, seed=0, resamples=60)
    assert np.log(found).std() == pytest.approx(np.log(fresh).std(), rel=0.5)


def test_sigma_data_is_about_the_mean() -> None:
    images = 5.0 + 0.3 * torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    assert measure_moments(images).spectrum().sigma_data == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(15, 4), "15 images are too few"),
        (torch.ones(20, 4), "all 20 images are the same"),
        (torch.full((20, 4), math.nan), "NaN or infinite"),
    ],
)
def test_unusable_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure_moments(images)


def test_more_stages_than_levels_are_refused() -> None:
    with pytest.raises(UserError, match="stages=4 must be between 1 and the 3 noise levels"):
        cluster(torch.zeros(3, 3, dtype=torch.float64), 4)


def test_moments_count_their_images() -> None:
    assert Moments(torch.ones(3), torch.ones(7, 3), 0.0, 9).images == 7


def test_the_proposed_density_is_where_the_wiener_denoiser_learns() -> None:
    # of two directions: the loss by quadrature of E|D - y|² / c_out², which is 1 for a network that answers nothing
    values, square = torch.tensor([4.0, 0.01], dtype=torch.float64), 2.005

    def gain(log: float) -> float:
        noise = math.exp(2 * log)
        error = sum(float(v) * noise / (float(v) + noise) for v in values) / 2
        return 1 - error * (noise + square) / (noise * square)

    logs = np.linspace(-14, 14, 20_001)
    weights = np.array([max(0.0, gain(log)) for log in logs])
    mean = (weights * logs).sum() / weights.sum()
    std = math.sqrt((weights * (logs - mean) ** 2).sum() / weights.sum())
    found = propose_density(Spectrum(values, 3.0))
    assert (found.p_mean, found.p_std) == pytest.approx((mean, std), abs=0.011)


def test_the_proposed_density_follows_the_scale_of_the_data() -> None:
    values = torch.logspace(1, -4, 300, dtype=torch.float64)
    found, larger = propose_density(Spectrum(values, 0.0)), propose_density(Spectrum(values * 9.0, 0.0))
    assert larger.p_mean - found.p_mean == pytest.approx(math.log(3), abs=0.011)
    assert larger.p_std == found.p_std
    assert propose_density(Spectrum(values, 0.0).binned()) == found


def test_grey_levels_end_the_proposed_density() -> None:
    values = torch.cat([torch.ones(30, dtype=torch.float64), torch.zeros(70, dtype=torch.float64)])  # a black border
    coarse, fine = (propose_density(Spectrum(values, 0.0), quantum) for quantum in (2 / 16, 2 / 255))
    assert fine.p_mean < coarse.p_mean


def test_white_images_propose_no_density() -> None:
    with pytest.raises(UserError, match="density=auto: all directions of the images vary alike"):
        propose_density(Spectrum(torch.full((8,), 0.25, dtype=torch.float64), 0.0))


def test_a_binned_spectrum_has_the_same_edges() -> None:
    values = torch.logspace(1, -6, 3000, dtype=torch.float64)
    whole = Spectrum(values, 1.0)
    binned = whole.binned()
    assert len(binned.values) <= 256
    assert (binned.dim, binned.sigma_data) == (3000, pytest.approx(whole.sigma_data, rel=1e-12))
    sigma = density_levels(PRIOR, 50)
    exact, close = output_distances(whole, sigma, edm()), output_distances(binned, sigma, edm())
    torch.testing.assert_close(close, exact, rtol=1e-3, atol=1e-6)
    assert gaussian_edges(binned, PRIOR, edm(), 3) == gaussian_edges(whole, PRIOR, edm(), 3)
