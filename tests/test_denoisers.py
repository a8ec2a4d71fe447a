from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from multistage_diffusion.contracts import Conditioning, Denoiser
from multistage_diffusion.denoisers import (
    EDMPreconditioning,
    MultiStageDenoiser,
    Velocity,
    VPEps,
    build_denoiser,
    make_preconditioning,
)
from multistage_diffusion.schedules import EDM, VE, VP, Discrete, RectifiedFlow
from multistage_diffusion.stages import Stages

SIGMAS = torch.tensor([0.002, 0.03, 0.4, 1.0, 7.0, 80.0], dtype=torch.float64)
ALL = [VPEps(VP()), VPEps(Discrete()), EDMPreconditioning(0.5), EDMPreconditioning(1.3), Velocity()]
NAMES = ["vp-eps", "discrete-eps", "edm", "edm-1.3", "velocity"]
preconditionings = pytest.mark.parametrize("precondition", ALL, ids=NAMES)


def column(v: torch.Tensor) -> torch.Tensor:
    return v[:, None, None, None]


def noisy_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    y, noise = (torch.randn(len(SIGMAS), 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return y, noise, y + column(SIGMAS) * noise


# -- coefficients -----------------------------------------------------------------------------------------------------


def test_vp_coefficients_written_out():
    t = torch.tensor([0.01, 0.2, 0.5, 0.9], dtype=torch.float64)
    alpha_bar = torch.exp(-(0.5 * 19.9 * t**2 + 0.1 * t))
    c = VPEps(VP()).coefficients(torch.sqrt((1 - alpha_bar) / alpha_bar))
    torch.testing.assert_close(c.skip, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(c.out, -torch.sqrt((1 - alpha_bar) / alpha_bar))
    torch.testing.assert_close(c.input, torch.sqrt(alpha_bar))
    torch.testing.assert_close(c.noise, 999 * t, rtol=1e-9, atol=0)


def test_discrete_network_is_given_the_step():
    betas = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, 0)[[0, 17, 500, 999]]
    c = VPEps(Discrete()).coefficients(torch.sqrt((1 - alpha_bar) / alpha_bar))
    torch.testing.assert_close(c.noise, torch.tensor([0.0, 17.0, 500.0, 999.0], dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(c.input, torch.sqrt(alpha_bar))


@pytest.mark.parametrize("data", [0.5, 0.75])
def test_edm_coefficients_written_out(data):
    c = EDMPreconditioning(data).coefficients(SIGMAS)
    for i, s in enumerate(SIGMAS.tolist()):
        expected = (
            data**2 / (s**2 + data**2),
            s * data / math.hypot(s, data),
            1 / math.hypot(s, data),
            math.log(s) / 4,
        )
        assert [float(v[i]) for v in c] == pytest.approx(expected, rel=1e-12)


def test_velocity_coefficients_written_out():
    t = torch.tensor([0.001, 0.3, 0.5, 0.99], dtype=torch.float64)
    c = Velocity().coefficients(t / (1 - t))
    for value, expected in zip(c, (1 - t, -t, 1 - t, 999 * t), strict=True):
        torch.testing.assert_close(value, expected)


def test_velocity_is_noise_minus_image_on_the_straight_path():
    y, noise, x = noisy_rows()
    torch.testing.assert_close(Velocity().target(y, noise, SIGMAS), noise - y)
    torch.testing.assert_close(VPEps(VP()).target(y, noise, SIGMAS), noise)
    t = column(SIGMAS / (1 + SIGMAS))
    c_in = column(Velocity().coefficients(SIGMAS).input)
    torch.testing.assert_close(c_in * x, (1 - t) * y + t * noise)  # the network sees x_t


@preconditionings
def test_target_solves_the_denoiser_for_f(precondition):
    y, noise, x = noisy_rows()
    c = precondition.coefficients(SIGMAS)
    expected = (y - column(c.skip) * x) / column(c.out)
    torch.testing.assert_close(precondition.target(y, noise, SIGMAS), expected, rtol=1e-9, atol=1e-9)


@preconditionings
def test_target_in_float32_does_not_cancel(precondition):
    sigma = torch.full((6,), 1e-3, dtype=torch.float64)
    y, noise, _ = noisy_rows()
    single = precondition.target(y.float(), noise.float(), sigma)
    torch.testing.assert_close(single, precondition.target(y, noise, sigma).float(), rtol=1e-5, atol=1e-5)


@preconditionings
def test_error_of_f_is_denoising_error_over_c_out(precondition):
    y, noise, x = noisy_rows()
    f = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    c = precondition.coefficients(SIGMAS)
    d = column(c.skip) * x + column(c.out) * f
    error = (f - precondition.target(y, noise, SIGMAS)).square()
    torch.testing.assert_close(error, (d - y).square() / column(c.out) ** 2, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("key", "kind"), [("vp-eps", VPEps), ("edm", EDMPreconditioning), ("velocity", Velocity)])
def test_configuration_names_the_preconditioning(tiny_config, key, kind):
    config = tiny_config(diffusion__precondition=key, diffusion__sigma_data=0.7).diffusion
    made = make_preconditioning(config)
    assert type(made) is kind
    assert getattr(made, "sigma_data", 0.7) == 0.7
    assert getattr(made, "schedule", config.schedule) == config.schedule


# -- analytic networks ------------------------------------------------------------------------------------------------


class GaussianNetwork(nn.Module):
    """Returns the optimal F for data N(mean, variance), from what a network is given only: c_in x and c_noise."""

    def __init__(self, precondition, mean: float, variance: float) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.precondition, self.mean, self.variance = precondition, mean, variance

    def sigma_of(self, noise: torch.Tensor) -> torch.Tensor:
        if isinstance(self.precondition, EDMPreconditioning):
            return torch.exp(4 * noise)
        if isinstance(self.precondition, Velocity):
            return (noise / 999) / (1 - noise / 999)
        schedule = self.precondition.schedule
        return schedule.sigma(noise if schedule.kind == "discrete" else noise / 999)

    def forward(self, scaled, noise, counts, cond=None):
        sigma = self.sigma_of(noise)
        c = self.precondition.coefficients(sigma)
        x = scaled / column(c.input)
        wiener = (self.variance * x + column(sigma**2) * self.mean) / (self.variance + column(sigma**2))
        return (wiener - column(c.skip) * x) / column(c.out)


@preconditionings
def test_optimal_f_of_gaussian_data_makes_the_wiener_filter(precondition):
    sigma = torch.tensor([0.05, 0.4, 1.0, 7.0, 80.0, 0.4], dtype=torch.float64)
    y, noise, _ = noisy_rows()
    x = y + column(sigma) * noise
    denoiser = MultiStageDenoiser(GaussianNetwork(precondition, 0.3, 0.6), Stages((0.5,)), precondition)
    expected = (0.6 * x + column(sigma**2) * 0.3) / (0.6 + column(sigma**2))
    torch.testing.assert_close(denoiser(x, sigma), expected, rtol=1e-8, atol=1e-8)


class StageNetwork(nn.Module):
    """F is the decoder's number."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x, noise, counts, cond=None):
        stage = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).double()
        return column(stage).expand_as(x)


def decoders_used(sigmas: list[float]) -> list[int]:
    denoiser = MultiStageDenoiser(StageNetwork(), Stages((0.5, 2.0)), VPEps(VP()))
    sigma = torch.tensor(sigmas, dtype=torch.float64)
    d = denoiser(torch.zeros(len(sigmas), 1, 1, 1, dtype=torch.float64), sigma)  # D = -sigma F
    return [round(v) for v in (-d.flatten() / sigma).tolist()]


def test_decoder_is_chosen_row_by_row_and_an_edge_belongs_above():
    below = math.nextafter(0.5, 0)
    assert decoders_used([3.0, 0.5, 1.0, below, 2.0, 0.1]) == [2, 1, 1, 0, 2, 0]
    assert decoders_used([0.5]) == [1]
    assert decoders_used([below]) == [0]


@pytest.mark.parametrize("bad", [math.nan, -1.0])
def test_impossible_sigma_is_refused(tiny_config, bad):
    denoiser = build_denoiser(tiny_config())
    with pytest.raises(ValueError, match="sigma"):
        denoiser(torch.zeros(2, 1, 4, 4), torch.tensor([0.1, bad]))
    with pytest.raises(ValueError, match="sigma"):
        denoiser.uniform(torch.zeros(2, 1, 4, 4), bad)


@pytest.mark.parametrize("schedule", [VP(), VE(), EDM(), RectifiedFlow(), Discrete()], ids=lambda s: s.kind)
def test_zero_noise_is_finite_for_noise_prediction_on_any_schedule(schedule):
    for precondition in (VPEps(schedule), EDMPreconditioning(), Velocity()):
        c = precondition.coefficients(torch.zeros(1, dtype=torch.float64))
        assert all(bool(torch.isfinite(v).all()) for v in c)
        assert float(c.skip) == 1
        assert float(c.out) == 0


# -- the real network -------------------------------------------------------------------------------------------------


@pytest.fixture
def denoiser(tiny_config):
    """A float64 three-decoder denoiser with labels, its near-zero last layers filled, so that every path matters."""
    torch.manual_seed(0)
    config = tiny_config(network__num_classes=3, network__channel_mult=(1, 2), network__attention_factors=(2,))
    made = build_denoiser(config).double().eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    return made


@pytest.fixture
def mixed():
    g = torch.Generator().manual_seed(3)
    sigma = torch.tensor([5.0, 0.1, 0.3, 0.05, 0.9, 0.2, 0.6], dtype=torch.float64)
    x = torch.randn(7, 1, 4, 4, generator=g, dtype=torch.float64) * column(1 + sigma)
    return x, sigma, Conditioning(labels=torch.tensor([0, -1, 2, 1, 1, 0, 2]))


def test_mixed_batch_equals_row_by_row_with_gradients(denoiser, mixed):
    x, sigma, cond = mixed

    def run(by_row: bool):
        denoiser.zero_grad()
        inputs = x.clone().requires_grad_()
        if by_row:
            rows = [slice(i, i + 1) for i in range(len(x))]
            out = torch.cat([denoiser(inputs[r], sigma[r], cond.rows(r)) for r in rows])
        else:
            out = denoiser(inputs, sigma, cond)
        (out * torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)).sum().backward()
        grads = {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}
        return out.detach(), inputs.grad, grads

    (out, dx, grads), (out_rows, dx_rows, grads_rows) = run(False), run(True)
    torch.testing.assert_close(out, out_rows, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, dx_rows, rtol=1e-9, atol=1e-9)
    assert grads.keys() == grads_rows.keys() == {n for n, _ in denoiser.named_parameters()}
    for name in grads:
        torch.testing.assert_close(grads[name], grads_rows[name], rtol=1e-8, atol=1e-8)


def test_counts_of_sorted_rows_give_the_same_as_looking_up_the_stage(denoiser, mixed):
    x, sigma, cond = mixed
    order = torch.argsort(sigma)
    x, sigma, cond = x[order], sigma[order], cond.rows(order)
    with torch.no_grad():
        by_counts = denoiser(x, sigma, cond, counts=(2, 2, 3))
        assert torch.equal(by_counts, denoiser(x, sigma, cond))
        c = denoiser.preconditioning.coefficients(sigma)
        by_hand = column(c.skip) * x + column(c.out) * denoiser.output(x, sigma, (2, 2, 3), cond)
    torch.testing.assert_close(by_counts, by_hand)


def test_one_sigma_as_a_number_gives_the_same_as_in_every_row(denoiser, mixed):
    x, _, cond = mixed
    with torch.no_grad():
        for sigma in (0.05, math.nextafter(0.2, 0), 0.2, 0.3, 0.6, 5.0):  # 0.2 and 0.6 are edges
            expected = denoiser(x, torch.full((7,), sigma, dtype=torch.float64), cond)
            assert torch.equal(denoiser.uniform(x, sigma, cond), expected)


def test_only_the_decoders_with_rows_get_a_gradient(denoiser, mixed):
    x, _, cond = mixed
    denoiser(x, torch.full((7,), 0.3, dtype=torch.float64), cond).sum().backward()
    with_gradient = {
        name for name, part in denoiser.network.parts().items() if any(p.grad is not None for p in part.parameters())
    }
    assert with_gradient == {"encoder", "decoder.2"}


@pytest.mark.parametrize("precondition", ["vp-eps", "edm", "velocity"])
def test_denoiser_keeps_the_dtype_and_is_the_identity_without_noise(tiny_config, precondition):
    denoiser = build_denoiser(tiny_config(diffusion__precondition=precondition)).eval()
    assert isinstance(denoiser, Denoiser)
    x = torch.randn(3, 1, 4, 4)
    with torch.no_grad():
        out = denoiser(x, torch.tensor([0.0, 0.3, 2.0]))
        assert denoiser(x.double(), torch.tensor([0.0, 0.3, 2.0])).dtype == torch.float64
    assert out.dtype == torch.float32
    assert bool(torch.isfinite(out).all())
    torch.testing.assert_close(out[0], x[0])
