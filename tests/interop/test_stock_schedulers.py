"""Which of diffusers' schedulers a run is exported with; tests of the export compare what they compute."""

from __future__ import annotations

from typing import Any

import pytest
from tiny import tiny_config

from multistage_diffusion.interop.stock_schedulers import stock_scheduler
from multistage_diffusion.schedules.discrete import Discrete, UniformSteps
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.workflow.import_unet2d import diffusers_ddim

STEPS = Discrete(steps=100, spacing="linear")
DISCRETE = {"precondition": "vp-eps", "schedule": STEPS, "prior": UniformSteps(schedule=STEPS)}
EDM = {"solver": "ddim", "spacing": "edm", "calls": 8, "denoise_last": "always"}
DPM = {**EDM, "solver": "dpm++", "method": "multistep", "order": 2, "calls": 12, "lower_final": "published"}
DISCRETE_DPM = {
    **DPM,
    "spacing": "time",
    "sigma_min": float(STEPS.sigma(7.0)),
    "sigma_max": float(STEPS.sigma(84.0)),
}
LDM_STEPS = {**EDM, "spacing": "ldm", "calls": 10, "denoise_last": "never", "sigma_min": None, "sigma_max": None}
FLOW = {"precondition": "velocity", "schedule": RectifiedFlow()}
FLOW_STEPS = {**EDM, "spacing": "time", "sigma_min": None, "sigma_max": None}


def kind(sampling: Any, diffusion: dict[str, Any] | None = None) -> str:
    changes: dict[str, Any] = {f"diffusion__{name}": value for name, value in (diffusion or {}).items()}
    if isinstance(sampling, dict):
        changes |= {f"sampling__{name}": value for name, value in sampling.items()}
    else:
        changes["sampling"] = sampling
    found = stock_scheduler(tiny_config(**changes))
    return "" if found is None else found.kind


def test_the_scheduler_that_makes_the_same_steps() -> None:
    assert kind(EDM) == "EDMEulerScheduler"
    assert kind({**EDM, "spacing": "log-snr"}) == "EDMEulerScheduler"
    assert kind(DPM) == "EDMDPMSolverMultistepScheduler"
    for trailing in (False, True):
        for lands in (False, True):
            assert kind(diffusers_ddim(10, trailing=trailing, lands=lands), DISCRETE) == "DDIMScheduler"
    assert kind(LDM_STEPS, DISCRETE) == "DDIMScheduler"
    assert kind(DISCRETE_DPM, DISCRETE) == "DPMSolverMultistepScheduler"
    assert kind(FLOW_STEPS, FLOW) == "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("sampling", "diffusion"),
    [
        ({**EDM, "spacing": "time"}, {}),
        ({**EDM, "eta": 0.5}, {}),
        ({**EDM, "threshold": 0.9}, {}),
        ({**EDM, "clip": 1.0}, {}),
        ({**EDM, "guidance_interval": (0.1, 1.0)}, {}),
        ({**EDM, "solver": "heun"}, {}),
        ({**DPM, "order": 3}, {}),
        ({**DPM, "lower_final": "always"}, {}),
        ({**DPM, "method": "singlestep"}, {}),
        ({**DPM, "calls": 8}, {}),  # as published, the last orders fall below 10 calls
        ({**EDM, "spacing": "time", "sigma_min": None, "sigma_max": None}, DISCRETE),  # not at whole steps
        ({**DISCRETE_DPM, "clip": 1.0}, DISCRETE),
        ({**DISCRETE_DPM, "sigma_min": float(STEPS.sigma(8.0))}, DISCRETE),
        ({**FLOW_STEPS, "spacing": "log-snr"}, FLOW),
        ({**FLOW_STEPS, "denoise_last": "never"}, FLOW),
    ],
    ids=str,
)
def test_without_such_a_scheduler_there_is_none(sampling: dict[str, Any], diffusion: dict[str, Any]) -> None:
    assert kind(sampling, diffusion) == ""


def test_where_ddims_last_step_ends() -> None:
    to_step_0 = tiny_config(
        **{f"diffusion__{k}": v for k, v in DISCRETE.items()}, **{f"sampling__{k}": v for k, v in LDM_STEPS.items()}
    )
    found = stock_scheduler(to_step_0)
    assert found is not None
    assert (found.settings["set_alpha_to_one"], found.settings["steps_offset"], found.calls) == (False, 1, 10)
    # 9 steps of 11: from step 10 diffusers' last one ends at the image, from step 11 at step 0
    for offset, name in ((10, "DDIMScheduler"), (11, "")):
        ends = {
            "sigma_min": float(STEPS.sigma(offset)),
            "sigma_max": float(STEPS.sigma(offset + 88)),
            "spacing": "time",
        }
        assert kind({**LDM_STEPS, **ends, "calls": 9, "denoise_last": "always"}, DISCRETE) == name
    ends = {"sigma_min": float(STEPS.sigma(0.5)), "sigma_max": float(STEPS.sigma(95.0)), "spacing": "time"}
    assert kind({**LDM_STEPS, **ends}, DISCRETE) == ""


def test_the_last_output_decides_where_edms_sigmas_end() -> None:
    for last, kept, calls in (("always", "zero", 8), ("never", "sigma_min", 9)):
        found = stock_scheduler(tiny_config(**{f"sampling__{k}": v for k, v in {**EDM, "denoise_last": last}.items()}))
        assert found is not None
        assert (found.settings["final_sigmas_type"], found.calls) == (kept, calls)
