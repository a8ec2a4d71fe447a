"""Coefficients and targets against the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch

from multistage_diffusion.preconditioning import make_preconditioning
from multistage_diffusion.preconditioning.edm import EDMPreconditioning
from multistage_diffusion.preconditioning.velocity import Velocity
from multistage_diffusion.preconditioning.vp_eps import VPEps
from multistage_diffusion.preconditioning.vp_sample import VPSample
from multistage_diffusion.preconditioning.vp_v import VPVelocity
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.schedules.vp import VP

SIGMAS = torch.tensor([0.002, 0.03, 0.4, 1.0, 7.0, 80.0], dtype=torch.float64)
ALL = [
    VPEps(VP()),
    VPEps(Discrete()),
    VPSample(VP()),
    VPVelocity(Discrete()),
    EDMPreconditioning(0.5),
    EDMPreconditioning(1.3),
    Velocity(),
]
NAMES = ["vp-eps", "discrete-eps", "vp-sample", "discrete-v", "edm", "edm-1.3", "velocity"]
preconditionings = pytest.mark.parametrize("precondition", ALL, ids=NAMES)


def column(v: torch.Tensor) -> torch.Tensor:
    return v[:, None, None, None]


def noisy_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    y, noise = (torch.randn(len(SIGMAS), 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
    return y, noise, y + column(SIGMAS) * noise


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


def test_predictions_of_the_data_and_of_v_are_the_papers():
    y, noise, x = noisy_rows()
    alpha = column((1 + SIGMAS**2).rsqrt())  # of the scaled state alpha y + sqrt(1 - alpha²) n
    torch.testing.assert_close(VPSample(VP()).target(y, noise, SIGMAS), y)
    torch.testing.assert_close(
        VPVelocity(VP()).target(y, noise, SIGMAS), alpha * noise - torch.sqrt(1 - alpha**2) * y, rtol=1e-9, atol=1e-9
    )
    for precondition in (VPSample(VP()), VPVelocity(VP())):
        c = precondition.coefficients(SIGMAS)
        torch.testing.assert_close(column(c.input) * x, alpha * x)
        torch.testing.assert_close(c.noise, VPEps(VP()).coefficients(SIGMAS).noise)


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


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        ("vp-eps", VPEps),
        ("vp-sample", VPSample),
        ("vp-v", VPVelocity),
        ("edm", EDMPreconditioning),
        ("velocity", Velocity),
    ],
)
def test_configuration_names_the_preconditioning(tiny_config, key, kind):
    config = tiny_config(diffusion__precondition=key, diffusion__sigma_data=0.7).diffusion
    made = make_preconditioning(config)
    assert type(made) is kind
    assert getattr(made, "sigma_data", 0.7) == 0.7
    assert getattr(made, "schedule", config.schedule) == config.schedule


@pytest.mark.parametrize("schedule", [VP(), VE(), EDM(), RectifiedFlow(), Discrete()], ids=lambda s: s.kind)
def test_zero_noise_is_finite_for_noise_prediction_on_any_schedule(schedule):
    for precondition in (VPEps(schedule), EDMPreconditioning(), Velocity()):
        c = precondition.coefficients(torch.zeros(1, dtype=torch.float64))
        assert all(bool(torch.isfinite(v).all()) for v in c)
        assert float(c.skip) == 1
        assert float(c.out) == 0
