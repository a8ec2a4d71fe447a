"""What diffusers' scheduler_config.json says, to and from our settings: betas, prediction, clipping, steps of its DDIM."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import DiffusionConfig
from ..errors import UserError
from ..reading import brief
from ..schedules.discrete import Discrete, UniformSteps

SPACINGS = {"linear": "linear", "scaled_linear": "sqrt", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "vp-eps", "sample": "vp-sample", "v_prediction": "vp-v"}
# Classes whose noise is that of Discrete; their steps differ, and are not read.
SCHEDULERS = (
    "DDIMInverseScheduler",
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
)
DDIM = ("DDIMParallelScheduler", "DDIMScheduler")
DDPM = ("DDPMParallelScheduler", "DDPMScheduler")
# Values of variance_type of DDPM's schedulers, and solvers here. With fixed_large_log, diffusers' samples are not finite.
VARIANCES = {"fixed_small": "ddpm", "fixed_small_log": "ddpm", "fixed_large": "ddpm-large", "fixed_large_log": ""}
_SPACINGS = ("leading", "trailing", "linspace")  # values of timestep_spacing
_CLIPPING = (*DDIM, *DDPM)  # unless told otherwise
_MOST_STEPS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Noise:
    """What a scheduler_config.json says of the noise.

    Attributes:
        diffusion: schedule, density (every step equally often) and meaning of the network's output.
        clip: bound of denoised images; None: no clipping.
        offset: step of the last denoiser call (steps_offset), for spacing "leading".
        trailing: whether timestep_spacing is "trailing"; "linspace" is read as "leading", with a warning.
        lands: whether the last output is the image (set_alpha_to_one); else DDIM ends at the noise of step 0.
        linspace: whether timestep_spacing is "linspace".
        scheduler: its class.
        solver: the solver here that makes its steps; empty: none does.
    """

    diffusion: DiffusionConfig
    clip: float | None
    offset: int
    trailing: bool = False
    lands: bool = True
    linspace: bool = False
    scheduler: str = "DDIMScheduler"
    solver: str = "ddim"


def read_noise(config: Mapping[str, Any]) -> Noise:
    """Return the noise of a scheduler_config.json.

    Raises:
        UserError: naming the first setting that no schedule here has.
    """
    kind = config.get("_class_name")
    if kind not in SCHEDULERS:
        raise UserError(f"_class_name={brief(kind)}: only the noise of {', '.join(SCHEDULERS)} is read")
    for name in ("rescale_betas_zero_snr", "use_flow_sigmas"):
        if config.get(name):
            raise UserError(
                f"{name}={brief(config[name])}: is not read: "
                + ("at its last step no signal is left" if name.startswith("rescale") else "its noise is another")
            )
    prediction = config.get("prediction_type", "epsilon")
    if not isinstance(prediction, str) or prediction not in PREDICTIONS:
        raise UserError(f"prediction_type={brief(prediction)}: only {', '.join(PREDICTIONS)} are read")
    if "variance_type" in config and str(config["variance_type"]).startswith("learned"):
        raise UserError(f"variance_type={brief(config['variance_type'])}: a learnt variance is not read")
    schedule, solver = _schedule(config), _solver(kind, config)
    if kind not in _CLIPPING:
        warnings.warn(
            f"_class_name={kind!r}: its noise is read, its steps and their settings are not; the run is sampled by the DDIM "
            "that diffusers makes of this file, so samples differ from those of the pipeline",
            stacklevel=2,
        )
    return Noise(
        diffusion=DiffusionConfig(
            precondition=PREDICTIONS[prediction], schedule=schedule, prior=UniformSteps(schedule=schedule)
        ),
        clip=_clip(config, clips=kind in _CLIPPING),
        offset=_offset(config, schedule.steps),
        trailing=_is_trailing(config),
        lands=_lands(config),
        linspace=config.get("timestep_spacing") == "linspace",
        scheduler=kind,
        solver=solver,
    )


def _solver(kind: str, config: Mapping[str, Any]) -> str:
    """Return the solver that makes a scheduler's steps; empty if none does."""
    if kind not in DDPM:
        return "ddim" if kind in DDIM else ""
    variance = config.get("variance_type", "fixed_small")
    if not isinstance(variance, str) or variance not in VARIANCES:
        raise UserError(f"variance_type={brief(variance)}: only {', '.join(VARIANCES)} are read")
    return VARIANCES[variance]


def _is_trailing(config: Mapping[str, Any]) -> bool:
    spacing = config.get("timestep_spacing", "leading")
    if spacing not in _SPACINGS:
        raise UserError(f"timestep_spacing={brief(spacing)}: only {', '.join(_SPACINGS)} are read")
    if spacing == "linspace":
        warnings.warn(
            "timestep_spacing=linspace is read as leading: samples differ a little from those of diffusers' DDIM",
            stacklevel=2,
        )
    return bool(spacing == "trailing")


def _lands(config: Mapping[str, Any]) -> bool:
    lands = config.get("set_alpha_to_one", True)
    if not isinstance(lands, bool):
        raise UserError(f"set_alpha_to_one={brief(lands)} must be true or false")
    return lands


def _offset(config: Mapping[str, Any], steps: int) -> int:
    offset: int = _number(config, "steps_offset", 0, whole=True)
    if not 0 <= offset < steps // 2:
        raise UserError(f"steps_offset={offset} must be from 0 to less than half of the {steps} steps")
    return offset


def _schedule(config: Mapping[str, Any]) -> Discrete:
    given = config.get("trained_betas")
    if given is None:
        name, schedule = "beta_end", _computed(config)
    else:
        betas, name = _trained(given, _steps(config)), "trained_betas"
        schedule = Discrete(steps=len(betas), spacing="given", betas=betas)
    if not (schedule.sigmas.isfinite().all() and schedule.sigmas[0] > 0):
        raise UserError(
            f"{name}={brief(config.get(name, 0.02))}: leaves no signal at the last steps, or no noise at the first; only steps "
            "with both are read"
        )
    return schedule


def _trained(betas: Any, steps: int) -> tuple[float, ...]:
    """Return the betas of the training's steps, checked."""
    if not isinstance(betas, list) or not all(type(beta) in (int, float) for beta in betas):
        raise UserError("trained_betas must be a list of numbers")
    if len(betas) < steps:  # diffusers cannot sample such a model
        raise UserError(f"trained_betas has {len(betas)} numbers, fewer than num_train_timesteps={steps}")
    for i, beta in enumerate(betas[:steps]):
        if not 0 < beta < 1:
            raise UserError(f"trained_betas: number {i + 1} is {beta}, but all must be in (0, 1)")
    return tuple(float(beta) for beta in betas[:steps])


def _computed(config: Mapping[str, Any]) -> Discrete:
    """Return the schedule of beta_schedule."""
    kind = config.get("beta_schedule", "linear")
    if not isinstance(kind, str) or kind not in SPACINGS:
        raise UserError(f"beta_schedule={brief(kind)}: only {', '.join(SPACINGS)} are read")
    start, end, steps = _number(config, "beta_start", 1e-4), _number(config, "beta_end", 0.02), _steps(config)
    if kind == "squaredcos_cap_v2":
        return Discrete(steps=steps, spacing="cosine")
    if not 0 < start <= end < 1:
        raise UserError(f"beta_start={start} and beta_end={end} must be 0 < beta_start <= beta_end < 1")
    return Discrete(beta_start=start, beta_end=end, steps=steps, spacing=SPACINGS[kind])


def _steps(config: Mapping[str, Any]) -> int:
    steps: int = _number(config, "num_train_timesteps", 1000, whole=True)
    if not 1 < steps <= _MOST_STEPS:
        raise UserError(f"num_train_timesteps={steps} must be 2 to {_MOST_STEPS}")
    return steps


def _clip(config: Mapping[str, Any], *, clips: bool) -> float | None:
    """Return the bound of denoised images; thresholding with its default sample_max_value of 1 is a bound of 1, too."""
    for name in ("thresholding", "clip_sample"):
        if not isinstance(config.get(name), bool | None):
            raise UserError(f"{name}={brief(config[name])} must be true or false")
    if config.get("thresholding"):
        most = _number(config, "sample_max_value", 1.0)
        if most != 1:
            raise UserError(f"sample_max_value={most:g} with thresholding: only 1 is read; set sampling.threshold")
        return 1.0
    if not config.get("clip_sample", clips):
        return None
    bound = float(_number(config, "clip_sample_range", 1.0))
    if not 0 < bound < math.inf:
        raise UserError(f"clip_sample_range={bound} must be positive and finite; set clip_sample to false for no bound")
    return bound


def _number(config: Mapping[str, Any], name: str, default: float, *, whole: bool = False) -> Any:
    value = config.get(name, default)
    if type(value) is not int and (whole or type(value) is not float):
        raise UserError(f"{name}={brief(value)} must be a {'whole ' if whole else ''}number")
    return value


def noise_settings(diffusion: DiffusionConfig, clip: float | None) -> dict[str, Any]:
    """Return the settings of a scheduler_config.json that give the noise: the inverse of `read_noise`.

    Raises:
        UserError: if the schedule is not discrete, or the prediction is none that diffusers' schedulers know.
    """
    schedule, known = diffusion.schedule, {ours: theirs for theirs, ours in PREDICTIONS.items()}
    if not isinstance(schedule, Discrete) or diffusion.precondition not in known:
        raise UserError(
            f"diffusion.schedule={schedule.kind!r} with diffusion.precondition={diffusion.precondition!r}: diffusers' "
            "discrete schedulers have schedule 'discrete' with " + ", ".join(repr(ours) for ours in known)
        )
    names = {ours: theirs for theirs, ours in SPACINGS.items()}
    return {
        "num_train_timesteps": schedule.steps,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "beta_schedule": names.get(schedule.spacing, "linear"),
        "trained_betas": list(schedule.betas) or None,
        "prediction_type": known[diffusion.precondition],
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
    }
