"""Which of diffusers' own schedulers makes exactly the steps of a run's sampler, and with which settings.

EDMEulerScheduler                EDM's preconditioning, DDIM without noise (Euler's method in sigma)
EDMDPMSolverMultistepScheduler   EDM's preconditioning, DPM-Solver++, multistep, of orders 1, 2, 2, ...
DDIMScheduler                    discrete steps, DDIM at the steps of timestep_spacing "leading" or "trailing", to image or step 0
DPMSolverMultistepScheduler      discrete steps, DPM-Solver++ as above, at its own steps of spacing "leading"
FlowMatchEulerDiscreteScheduler  velocity, DDIM without noise (Euler's method in rectified flow's time)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..config import RunConfig, SamplingConfig
from ..errors import UserError
from ..samplers import Plan, Step, make_plan
from ..schedules.discrete import Discrete
from .noise_config import noise_settings

_DPM = {
    "algorithm_type": "dpmsolver++",
    "solver_order": 2,
    "solver_type": "midpoint",
    "lower_order_final": False,
    "euler_at_final": True,
}


@dataclass(frozen=True, kw_only=True)
class Stock:
    """One of diffusers' schedulers.

    Attributes:
        kind: name of the class.
        settings: of its scheduler_config.json.
        calls: network calls that make the run's steps.
        initial_std: standard deviation of the starting noise; None: the scheduler's own.
        times: first and last time, if its timesteps are those of rectified flow.
        final_scale: factor from its last state, which is divided by sqrt(1 + sigma²), to the run's sample.
    """

    kind: str
    settings: dict[str, Any]
    calls: int
    initial_std: float | None = None
    times: tuple[float, float] | None = None
    final_scale: float = 1.0


def stock_scheduler(config: RunConfig) -> Stock | None:
    """Return the scheduler of diffusers that makes exactly the steps of a run's sampler; None if there is none."""
    sampling, diffusion = config.sampling, config.diffusion
    plan = make_plan(sampling, diffusion.schedule)
    if plan.stochastic or sampling.threshold is not None or sampling.guidance_interval is not None:
        return None
    if diffusion.precondition == "edm" and sampling.clip is None:
        return _edm(config, plan)
    if diffusion.precondition == "velocity" and sampling.solver == "ddim" and sampling.clip is None:
        return _flow(plan)
    if isinstance(diffusion.schedule, Discrete) and sampling.solver == "ddim":
        return _ddim(config, plan, diffusion.schedule)
    if isinstance(diffusion.schedule, Discrete) and sampling.clip is None:
        return _discrete_dpm(config, plan, diffusion.schedule)
    return None


def _lands(plan: Plan) -> bool:
    """Return whether the last output is the result."""
    return plan.steps[-1].end == 0


def _edm(config: RunConfig, plan: Plan) -> Stock | None:
    sampling = config.sampling
    spacing = {"edm": "karras", "log-snr": "exponential"}.get(sampling.spacing)
    steps = plan.steps[:-1] if _lands(plan) else plan.steps
    if spacing is None or not steps:
        return None
    high, low = plan.calls[0], steps[-1].end
    settings: dict[str, Any] = {
        "sigma_min": low,
        "sigma_max": high,
        "sigma_data": config.diffusion.sigma_data,
        "sigma_schedule": spacing,
        "rho": sampling.rho,
        "prediction_type": "epsilon",
        "final_sigmas_type": "zero" if _lands(plan) else "sigma_min",
    }
    # without a last output, the scheduler's last step is one from sigma_min to itself
    calls = len(plan.calls) + (not _lands(plan))
    if sampling.solver == "ddim":
        return Stock(kind="EDMEulerScheduler", settings=settings, calls=calls, initial_std=plan.initial_noise_std)
    if not _second_order(config, steps):
        return None
    return Stock(
        kind="EDMDPMSolverMultistepScheduler",
        settings={**settings, **_DPM},
        calls=calls,
        initial_std=plan.initial_noise_std,
    )


def _second_order(config: RunConfig, steps: Sequence[Step]) -> bool:
    """Return whether steps are those of DPM-Solver++, multistep, of orders 1, 2, 2, ..."""
    sampling = config.sampling
    multistep = sampling.solver == "dpm++" and sampling.method == "multistep" and sampling.order == 2
    return multistep and [step.order for step in steps] == [1, *[2] * (len(steps) - 1)]


def _flow(plan: Plan) -> Stock | None:
    """Return Euler's method in t = sigma / (1 + sigma): evenly spaced times, and the last output is the result."""
    times = [sigma / (1.0 + sigma) for sigma in plan.calls]
    even = [times[0] + (times[-1] - times[0]) * i / max(len(times) - 1, 1) for i in range(len(times))]
    if not _lands(plan) or any(abs(a - b) > 1e-9 for a, b in zip(times, even, strict=True)):
        return None
    return Stock(
        kind="FlowMatchEulerDiscreteScheduler",
        settings={"num_train_timesteps": 1000, "shift": 1.0},
        calls=len(times),
        initial_std=plan.initial_noise_std * (1.0 - times[0]),  # its state is (1 - t) y + t n
        times=(times[0], times[-1]),
    )


def _discrete_dpm(config: RunConfig, plan: Plan, schedule: Discrete) -> Stock | None:
    times, calls = [float(schedule.time(sigma)) for sigma in plan.calls], len(plan.calls)
    ratio = schedule.steps // (calls + 1)
    offset = round(times[-1]) - ratio
    leading = [offset + ratio * (calls - i) for i in range(calls)]
    if not _lands(plan) or offset < 0 or any(abs(a - b) > 1e-6 for a, b in zip(times, leading, strict=True)):
        return None
    if not _second_order(config, plan.steps[:-1]):
        return None
    try:
        noise = noise_settings(config.diffusion, None)
    except UserError:
        return None
    kept = {name: value for name, value in noise.items() if not name.startswith("clip_sample")}
    settings = {**kept, **_DPM, "steps_offset": offset, "timestep_spacing": "leading", "final_sigmas_type": "zero"}
    return Stock(kind="DPMSolverMultistepScheduler", settings=settings, calls=calls)


def ddim_steps(sampling: SamplingConfig, plan: Plan, schedule: Discrete) -> dict[str, Any] | None:
    """Return the settings of a DDIMScheduler that calls the network where a plan does and ends there; None if there are none."""
    times = [float(schedule.time(sigma)) for sigma in plan.calls]
    calls, offset, ratio = len(times), round(times[-1]), schedule.steps // len(times)
    leading = [offset + ratio * (calls - 1 - i) for i in range(calls)]
    if any(abs(a - b) > 1e-6 for a, b in zip(times, leading, strict=True)):
        return None
    # its last step ends `ratio` below the last call: before step 0 at the image, or at step 0 without set_alpha_to_one
    end, first, lands = plan.steps[-1].end, float(schedule.sigma(0.0)), _lands(plan)
    if not (offset < ratio if lands else offset <= ratio and math.isclose(end, first, rel_tol=1e-9)):
        return None
    trailing = sampling.spacing == "trailing"
    return {
        "set_alpha_to_one": lands,
        "steps_offset": 0 if trailing else offset,
        "timestep_spacing": "trailing" if trailing else "leading",
    }


def _ddim(config: RunConfig, plan: Plan, schedule: Discrete) -> Stock | None:
    steps, calls, end = ddim_steps(config.sampling, plan, schedule), len(plan.calls), plan.steps[-1].end
    if steps is None:
        return None
    try:
        noise = noise_settings(config.diffusion, config.sampling.clip)
    except UserError:
        return None
    assert math.isclose(plan.initial_noise_std, math.hypot(1.0, plan.calls[0]))  # the scaled state is unit noise
    return Stock(kind="DDIMScheduler", settings={**noise, **steps}, calls=calls, final_scale=math.hypot(1.0, end))
