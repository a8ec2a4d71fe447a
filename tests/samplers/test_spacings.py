"""Spacings beyond those that every plan test covers: latent diffusion's own steps, and those of diffusers' DDIM."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.errors import UserError
from multistage_diffusion.samplers import make_plan, sample
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.vp import VP

OWN = {"solver": "ddim", "spacing": "ldm", "denoise_last": "never"}


@pytest.mark.parametrize(("calls", "first"), [(20, 951), (50, 981), (2, 501), (500, 999)])
def test_calls_are_at_latent_diffusion_s_steps(calls: int, first: int) -> None:
    schedule = Discrete()
    steps = list(range(first, 0, -1000 // calls))
    plan = make_plan(SamplingConfig(calls=calls, **OWN), schedule)  # type: ignore[arg-type]
    assert list(plan.calls) == pytest.approx(schedule.sigmas[steps].tolist(), rel=1e-12)
    assert [step.end for step in plan.steps] == pytest.approx(schedule.sigmas[[*steps[1:], 0]].tolist(), rel=1e-12)
    assert plan.initial_noise_std == pytest.approx((1 + plan.calls[0] ** 2) ** 0.5)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_on_these_steps_is_that_of_the_paper(eta: float) -> None:
    """Song et al. 2021, equation 12, step by step on the scaled state, for a denoiser known in closed form."""
    schedule, deviation = Discrete(), 0.5
    kept = 1.0 / (1.0 + schedule.sigmas**2)  # alpha_bar
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, dtype=torch.float64, generator=generator)
    noises = [torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(20)]

    def denoise(x: torch.Tensor, sigma: Any, cond: Any = None) -> torch.Tensor:
        return x * deviation**2 / (deviation**2 + sigma**2)

    plan = make_plan(SamplingConfig(calls=20, eta=eta, **OWN), schedule)  # type: ignore[arg-type]
    end = sample(denoise, x * plan.initial_noise_std, plan, noise=lambda step: noises[step])
    steps = list(range(951, 0, -50))
    for noise, now, after in zip(noises, steps, [*steps[1:], 0], strict=True):
        a, b = kept[now], kept[after]
        clean = denoise(x / a.sqrt(), schedule.sigmas[now])
        eps = (x - a.sqrt() * clean) / (1 - a).sqrt()
        added = eta * ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
        x = b.sqrt() * clean + (1 - b - added**2).sqrt() * eps + added * noise
    assert torch.allclose(end, x / kept[0].sqrt(), rtol=1e-10, atol=1e-12)


def test_inner_points_of_these_steps_are_even_in_time() -> None:
    schedule = Discrete()
    changes: dict[str, Any] = {"solver": "dpm", "order": 2, "lower_final": "published"}
    plan = make_plan(SamplingConfig(calls=20, **{**OWN, **changes}), schedule)
    times = [round(float(schedule.time(sigma)), 6) for sigma in plan.calls]
    assert times[:4] == [951, 901, 851, 801]
    assert len(times) == 20


@pytest.mark.parametrize(
    ("changes", "schedule", "words"),
    [
        ({}, VP(), "sampling.spacing='ldm': names steps of a discrete schedule, not of 'vp'; use 'time'"),
        ({"sigma_max": 20.0}, Discrete(), "sampling.sigma_max=20: spacing 'ldm' has its own ends"),
        ({"calls": 30}, Discrete(), "sampling.calls=30 must be 2 to 500 and divide the schedule's 1000 steps"),
        ({"calls": 1000}, Discrete(), "sampling.calls=1000 must be 2 to 500"),  # 1 + 999 is beyond the last step
        ({"denoise_last": "auto"}, Discrete(), "sampling.calls=20 leaves 19 with sampling.denoise_last, which must"),
    ],
)
def test_what_latent_diffusion_has_no_steps_for_is_refused(changes: dict[str, Any], schedule: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(SamplingConfig(**{"calls": 20, **OWN, **changes}), schedule)
    assert words in str(caught.value)


@pytest.mark.parametrize("lands", [True, False])
@pytest.mark.parametrize(("spacing", "offset"), [("leading", 0), ("leading", 1), ("leading", 7), ("trailing", 0)])
@pytest.mark.parametrize("calls", [2, 20, 50, 125, 73])
def test_calls_are_at_the_steps_of_diffusers_ddim(calls: int, spacing: str, offset: int, lands: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    schedule = Discrete(beta_start=1e-4, beta_end=0.02, spacing="linear")
    low = float(schedule.sigma(float(offset))) if offset else None
    last = "always" if lands else "never"
    config = SamplingConfig(solver="ddim", calls=calls, spacing=spacing, sigma_min=low, denoise_last=last)  # type: ignore[arg-type]
    if 1000 % calls and spacing == "trailing":
        with pytest.raises(UserError, match=r"sampling.calls=73 must divide the schedule's 1000 steps"):
            make_plan(config, schedule)
        return
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(calls)
    steps = theirs.timesteps.tolist()
    plan = make_plan(config, schedule)
    assert [float(schedule.time(sigma)) for sigma in plan.calls] == pytest.approx(steps, abs=1e-9)
    ends = [float(schedule.sigma(float(step))) for step in steps[1:]]
    assert [step.end for step in plan.steps] == pytest.approx([*ends, 0.0 if lands else float(schedule.sigma(0.0))])


@pytest.mark.parametrize("solver", ["dpm", "dpm++", "heun"])
@pytest.mark.parametrize("lands", ["always", "never"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_other_solvers_make_finite_steps_in_this_range(solver: str, lands: str, spacing: str) -> None:
    schedule = Discrete()
    config = SamplingConfig(solver=solver, order=2, calls=20, spacing=spacing, denoise_last=lands)  # type: ignore[arg-type]
    plan = make_plan(config, schedule)
    assert plan.calls[0] == pytest.approx(float(schedule.sigma(950.0 if spacing == "leading" else 999.0)))
    assert all(step.length > 0 for step in plan.steps)


@pytest.mark.parametrize(
    ("changes", "schedule", "words"),
    [
        ({}, VP(), "sampling.spacing='leading': names steps of a discrete schedule, not of 'vp'; use 'time'"),
        ({"sigma_max": 20.0}, Discrete(), "sampling.sigma_max=20: spacing 'leading' has its own start"),
        ({"calls": 1001}, Discrete(), "sampling.calls=1001 must be 2 to 1000, the schedule's steps"),
        ({"sigma_min": 0.05}, Discrete(), "sampling.sigma_min=0.05: is at no step of the schedule"),
        (
            {"sigma_min": float(Discrete().sigma(50.0))},
            Discrete(),
            "is step 50, but 20 calls on 1000 steps are 50 apart and leave room for 0 to 49 in spacing 'leading'",
        ),
        (
            {"sigma_min": float(Discrete(steps=1004).sigma(3.0)), "calls": 1003},
            Discrete(steps=1004),
            "is step 3, but 1003 calls on 1004 steps are 1 apart and leave room for 0 to 0",
        ),
        (
            {"spacing": "trailing", "sigma_min": 0.05},
            Discrete(),
            "sampling.sigma_min=0.05: spacing 'trailing' has its own end",
        ),
    ],
)
def test_what_diffusers_has_no_steps_for_is_refused(changes: dict[str, Any], schedule: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(SamplingConfig(**{"solver": "ddim", "calls": 20, "spacing": "leading", **changes}), schedule)
    assert words in str(caught.value)
