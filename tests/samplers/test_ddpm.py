"""DDPM's steps are those of diffusers' DDPMScheduler, with the same noise."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.samplers import make_plan, sample, shortcoming
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.ve import VE

diffusers = pytest.importorskip("diffusers")

VARIANCES = {"fixed_small": "ddpm", "fixed_small_log": "ddpm", "fixed_large": "ddpm-large"}
STEPS = 60
SCHEDULE = Discrete(steps=STEPS, beta_end=0.3)


def predicted(x: Tensor, step: float) -> Tensor:
    """An output of a network: noise that drives images out of [-1, 1], so that clipping matters."""
    return torch.sin(2 * x + step / 10) + 0.3 * x


def denoise(x: Tensor, sigma: float, cond: Any = None) -> Tensor:
    step = float(SCHEDULE.time(sigma))
    return x - sigma * predicted(x / math.hypot(1.0, sigma), step)


def noises(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(5, 4, dtype=torch.float64, generator=generator) for _ in range(count)]


def theirs(x: Tensor, calls: int, drawn: list[Tensor], monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Tensor:
    """The loop of diffusers' DDPMPipeline, in float64."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=STEPS, beta_end=0.3, **settings)
    scheduler.alphas_cumprod = 1 / (1 + SCHEDULE.sigmas**2)
    scheduler.one = torch.tensor(1.0, dtype=torch.float64)
    rest = iter(drawn)
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: next(rest))
    scheduler.set_timesteps(calls)
    for step in scheduler.timesteps:
        x = scheduler.step(predicted(x, float(step)), step, x).prev_sample
    return x


@pytest.mark.parametrize("clip", [None, 1.0, 0.5])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize(("calls", "spacing"), [(STEPS, "leading"), (STEPS, "trailing"), (12, "leading")])
def test_steps_are_those_of_diffusers(
    calls: int, spacing: Any, variance: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"variance_type": variance, "timestep_spacing": spacing, "clip_sample": clip is not None}
    x, drawn = noises(1)[0], noises(calls)
    expected = theirs(x, calls, drawn, monkeypatch, **settings, clip_sample_range=clip or 1.0)
    config = SamplingConfig(solver=VARIANCES[variance], calls=calls, spacing=spacing, denoise_last="always", clip=clip)
    plan = make_plan(config, SCHEDULE)
    assert plan.stochastic
    ours = sample(denoise, x * plan.initial_noise_std, plan, noise=lambda step: drawn[step])
    assert (ours - expected).abs().max() < 1e-10 * max(1.0, float(expected.abs().max()))
    if clip is not None:
        free = sample(
            denoise,
            x * plan.initial_noise_std,
            make_plan(SamplingConfig(**{**vars(config), "clip": None}), SCHEDULE),
            noise=lambda step: drawn[step],
        )
        assert (ours - free).abs().max() > 0.01  # the bound acts


def test_without_a_bound_it_is_ddim_with_eta_1() -> None:
    x, drawn = noises(1)[0], noises(20)
    ends = []
    for solver, eta in (("ddpm", 0.0), ("ddim", 1.0)):
        plan = make_plan(SamplingConfig(solver=solver, calls=20, eta=eta, spacing="time"), SCHEDULE)
        ends.append(sample(denoise, x * plan.initial_noise_std, plan, noise=lambda step: drawn[step]))
    assert torch.allclose(ends[0], ends[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("schedule", [VE(), EDM()])
def test_where_states_are_not_scaled_the_large_variance_is_the_noise_that_a_step_removes(schedule: Any) -> None:
    plan = make_plan(SamplingConfig(solver="ddpm-large", calls=5, denoise_last="never"), schedule)
    assert [step.noise_std**2 for step in plan.steps] == pytest.approx(
        [step.calls[0] ** 2 - step.end**2 for step in plan.steps]
    )


@pytest.mark.parametrize("solver", ["ddpm", "ddpm-large"])
def test_samples_have_the_variance_of_the_data(solver: str) -> None:
    """For Gaussian images, whose denoiser is known; with all steps of a fine schedule both variances are right."""
    schedule, deviation = Discrete(), 0.5
    plan = make_plan(SamplingConfig(solver=solver, calls=1000, spacing="leading", denoise_last="always"), schedule)
    generator = torch.Generator().manual_seed(0)

    def exact(x: Tensor, sigma: float, cond: Any = None) -> Tensor:
        return x * deviation**2 / (deviation**2 + sigma**2)

    def drawn(_: int = 0) -> Tensor:
        return torch.randn(20000, dtype=torch.float64, generator=generator)

    end = sample(exact, drawn().unsqueeze(1) * plan.initial_noise_std, plan, noise=lambda step: drawn().unsqueeze(1))
    assert float(end.std()) == pytest.approx(deviation, rel=0.03)


def test_few_calls_are_warned_of() -> None:
    settings: dict[str, Any] = {"solver": "ddpm", "spacing": "leading"}
    few, many = (make_plan(SamplingConfig(calls=calls, **settings), Discrete()) for calls in (50, 1000))
    assert shortcoming(many) is None
    assert "ddpm: 50 calls are few for it" in str(shortcoming(few))
