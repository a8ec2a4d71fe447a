"""scheduler_config.json: betas, prediction and clipping against diffusers' own schedulers."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch

from multistage_diffusion.config import DiffusionConfig
from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.noise_config import SCHEDULERS, noise_settings, read_noise
from multistage_diffusion.schedules.discrete import Discrete

diffusers = pytest.importorskip("diffusers")

NOISES: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195, "clip_sample": False},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
    {"trained_betas": [0.1, 0.02, 0.3, 0.4], "num_train_timesteps": 4, "prediction_type": "sample"},
    {"prediction_type": "v_prediction", "clip_sample_range": 2.0, "steps_offset": 1},
]


def file_of(scheduler: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(scheduler.to_json_string())
    return found


@pytest.mark.parametrize("settings", NOISES, ids=str)
def test_the_noise_of_every_step_is_that_of_diffusers_and_comes_back(settings: dict[str, Any]) -> None:
    scheduler = diffusers.DDIMScheduler(**settings)
    noise = read_noise(file_of(scheduler))
    schedule = noise.diffusion.schedule
    assert isinstance(schedule, Discrete)
    kept = 1 / (1 + schedule.sigmas**2)
    # diffusers multiplies in float32: relative errors of up to 1e-4 over 1000 steps near beta = 1
    torch.testing.assert_close(kept, scheduler.alphas_cumprod.double(), rtol=2e-4, atol=1e-7)
    assert noise.offset == settings.get("steps_offset", 0)
    again = diffusers.DDIMScheduler(**noise_settings(noise.diffusion, noise.clip), steps_offset=noise.offset)
    assert torch.equal(again.alphas_cumprod, scheduler.alphas_cumprod)
    for name in ("prediction_type", "clip_sample"):
        assert again.config[name] == scheduler.config[name]
    assert read_noise(file_of(again)) == noise


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_what_the_output_means_is_what_diffusers_takes_it_for(prediction: str) -> None:
    from multistage_diffusion.preconditioning import make_preconditioning

    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(1000)
    x, out = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    diffusion = read_noise(file_of(scheduler)).diffusion
    for step in (0, 400, 999):
        theirs = scheduler.step(out, step, x).pred_original_sample
        sigma = diffusion.schedule.sigma(torch.tensor([float(step)]))
        c = make_preconditioning(diffusion).coefficients(sigma)
        ours = c.skip * (x / c.input) + c.out * out  # their state is scaled by s = c_in
        # diffusers' 1 - alpha_bar is a float32 difference
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
        assert float(c.noise) == pytest.approx(step, abs=1e-6)


def test_clipping_is_the_default_of_the_classes_that_clip_by_default() -> None:
    assert read_noise({"_class_name": "DDPMScheduler"}).clip == 1.0
    assert read_noise({"_class_name": "DPMSolverMultistepScheduler"}).clip is None
    assert read_noise({"_class_name": "DDIMScheduler", "clip_sample": False}).clip is None
    assert read_noise({"_class_name": "DDIMScheduler", "clip_sample": False, "thresholding": True}).clip == 1.0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True: is not read"),
    ({"use_flow_sigmas": True}, "use_flow_sigmas=True"),
    ({"_class_name": "EDMEulerScheduler"}, "_class_name='EDMEulerScheduler'"),
    ({"prediction_type": "flow"}, "prediction_type='flow'"),
    ({"beta_schedule": "sigmoid"}, "beta_schedule='sigmoid': only linear, scaled_linear, squaredcos_cap_v2"),
    ({"variance_type": "learned_range"}, "variance_type='learned_range'"),
    ({"_class_name": "DDPMScheduler", "variance_type": "fixed"}, "variance_type='fixed': only fixed_small"),
    ({"trained_betas": "many"}, "trained_betas must be a list of numbers"),
    (
        {"trained_betas": [0.1, 1.5], "num_train_timesteps": 2},
        "trained_betas: number 2 is 1.5, but all must be in (0, 1)",
    ),
    ({"trained_betas": [0.1, 0.2]}, "trained_betas has 2 numbers, fewer than num_train_timesteps=1000"),
    ({"num_train_timesteps": 10**11}, "num_train_timesteps=100000000000 must be 2 to 1000000"),
    ({"timestep_spacing": "bogus"}, "timestep_spacing='bogus': only leading, trailing, linspace are read"),
    ({"timestep_spacing": None}, "timestep_spacing=None"),
    ({"beta_start": "low"}, "beta_start='low' must be a number"),
    ({"num_train_timesteps": 10.5}, "num_train_timesteps=10.5 must be a whole number"),
    ({"thresholding": True, "sample_max_value": 3.0}, "sample_max_value=3 with thresholding"),
    ({"prediction_type": ["epsilon"]}, "prediction_type=['epsilon']"),
    ({"beta_schedule": ["linear"]}, "beta_schedule=['linear']"),
    ({"clip_sample": "no"}, "clip_sample='no' must be true or false"),
    ({"steps_offset": -5}, "steps_offset=-5 must be from 0"),
    ({"beta_start": 0.5}, "beta_start=0.5 and beta_end=0.02 must be 0 < beta_start <= beta_end < 1"),
    ({"beta_end": float("nan")}, "beta_start=0.0001 and beta_end=nan must be"),
    ({"beta_end": 0.99999}, "beta_end=0.99999: leaves no signal at the last steps"),
    ({"trained_betas": [0.9] * 1000}, "trained_betas=[0.9"),
    ({"clip_sample_range": 0}, "clip_sample_range=0.0 must be positive and finite"),
    ({"clip_sample_range": float("inf")}, "clip_sample_range=inf must be positive and finite"),
    ({"steps_offset": 500}, "steps_offset=500 must be from 0 to less than half of the 1000 steps"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_noise_that_no_schedule_has_is_refused_by_its_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_noise({**file_of(diffusers.DDPMScheduler()), **change})
    assert message in str(error.value)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", SCHEDULERS)
def test_a_sampler_that_is_not_read_is_warned_of(kind: str) -> None:
    settings = {**file_of(getattr(diffusers, kind)()), "timestep_spacing": "leading"}
    shared = kind in ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        noise = read_noise(settings)
    assert [f"_class_name='{kind}': its noise is read" in str(w.message) for w in caught] == [True] * (not shared)
    kept = 1 / (1 + noise.diffusion.schedule.sigma(torch.arange(1000.0)) ** 2)
    their = getattr(diffusers, kind)().alphas_cumprod
    torch.testing.assert_close(kept, their.double(), rtol=2e-4, atol=1e-7)


def test_only_the_steps_of_the_training_have_trained_betas() -> None:
    betas = [0.001 * (i + 1) for i in range(100)]
    scheduler = diffusers.DDIMScheduler(trained_betas=betas, num_train_timesteps=50)
    schedule = read_noise(file_of(scheduler)).diffusion.schedule
    assert isinstance(schedule, Discrete)
    kept = 1 / (1 + schedule.sigmas**2)
    torch.testing.assert_close(kept, scheduler.alphas_cumprod[:50].double(), rtol=2e-4, atol=1e-7)


def test_linspace_is_read_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="timestep_spacing=linspace is read as leading"):
        noise = read_noise(file_of(diffusers.DDIMScheduler(timestep_spacing="linspace")))
    assert not noise.trailing


def test_noise_that_no_scheduler_has_is_refused() -> None:
    with pytest.raises(UserError, match="schedule='vp'"):
        noise_settings(DiffusionConfig(), None)
