"""The plan of a sampler, computed on the host before sampling: steps, their orders and every sigma in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..config import SamplingConfig
from ..errors import UserError, require
from ..schedules import VP, NoiseSchedule
from .orders import (
    corrected_heun_steps,
    lowered_multistep_orders,
    lowered_singlestep_orders,
    multistep_orders,
    singlestep_orders,
)

VISIBLE = 1 / 127.5  # sigma of one grey level for data in [-1, 1]
VP_T_END = 1e-4  # end time of the paper's VP trajectories; training times start at 1e-3

Points = Callable[[float, float, int], list[float]]  # (start, end, count): the count + 1 sigmas from start to end


@dataclass(frozen=True, kw_only=True)
class Step:
    """One outer step.

    Attributes:
        calls: the sigmas of the denoiser calls, in order; the step starts at the first one.
        end: the sigma at which the step ends; 0 for Heun's last step and for a final call whose output is the result.
        order: order of the update.
        noise_std: standard deviation of the added noise: Heun adds it before the step (churn; calls[0] includes it),
            DDIM after the step (eta); 0 for none.
    """

    calls: tuple[float, ...]
    end: float
    order: int
    noise_std: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a trajectory, as float64 numbers on the host.

    Attributes:
        solver, method: as in SamplingConfig.
        steps: the outer steps, sigma descending.
        start_std: standard deviation of the unscaled starting noise.
    """

    solver: str
    method: str
    steps: tuple[Step, ...]
    start_std: float

    @property
    def calls(self) -> tuple[float, ...]:
        """The sigmas of all denoiser calls, in order."""
        return tuple(sigma for step in self.steps for sigma in step.calls)

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return any(step.noise_std > 0 for step in self.steps)


def make_plan(config: SamplingConfig, schedule: NoiseSchedule) -> Plan:
    """Return the plan of a sampler.

    DPM solvers and DDIM make exactly `calls` calls. With config.denoise_last the last one is at sigma_min. Heun with n
    sigmas makes 2n - 1 calls, so `calls` is an upper limit and n = (calls + 1) // 2. If some steps are too long to be
    corrected, Heun gets more sigmas instead. DDIM and Heun ignore `method` and `order`. sigma_max None is sigma(t_max)
    of the schedule; sigma_min None is sigma(t_min), or sigma(1e-4) for VP.

    Args:
        config: solver, order, calls, spacing, range and treatment of the last step.
        schedule: gives the default range, the time of spacing "time", and the standard deviation of the starting noise.

    Raises:
        UserError: for unknown names, too few calls, an empty or impossible range, or churn or eta with a solver that
            does not use it.
    """
    _check(config)
    low, high = _sigma_range(config, schedule)
    points, last = _spacing(config, schedule, low, high), _denoises_last(config, low)
    calls = config.calls - last
    if config.solver == "heun":
        steps = _heun_steps(config, points, low, high)
    elif config.solver == "ddim":
        steps = _ddim_steps(points(high, low, calls), config.eta)
    elif config.method == "multistep":
        steps = _multistep_steps(config, points(high, low, calls))
    else:
        steps = _singlestep_steps(config, calls, points, low, high)
    if last:
        steps.append(Step(calls=(low,), end=0.0, order=1))
    return Plan(solver=config.solver, method=config.method, steps=tuple(steps), start_std=schedule.start_std(high))


def _check(config: SamplingConfig) -> None:
    choices = {
        "solver": ("dpm", "dpm++", "ddim", "heun"),
        "method": ("singlestep", "multistep"),
        "spacing": ("log-snr", "time", "edm"),
        "lower_final": ("always", "published"),
        "denoise_last": ("auto", "always", "never"),
    }
    for name, known in choices.items():
        if getattr(config, name) not in known:
            raise UserError(f"sampling.{name}={getattr(config, name)!r} must be one of {', '.join(map(repr, known))}")
    for name, owner in (("churn", "heun"), ("eta", "ddim")):
        value = getattr(config, name)
        if value and config.solver != owner:
            raise UserError(
                f"sampling.{name}={value} has no meaning for solver {config.solver!r}; set it to 0 or take {owner!r}"
            )
    if config.solver == "heun" and config.calls < 3:
        raise UserError(f"sampling.calls={config.calls} is too few for solver 'heun'; its 2 sigmas need at least 3")
    if config.solver in ("dpm", "dpm++") and config.calls < config.order:
        raise UserError(
            f"sampling.calls={config.calls} is below sampling.order={config.order}; raise it or lower the order"
        )
    if config.denoise_last == "always" and config.solver != "heun" and config.calls <= _fewest_calls(config):
        raise UserError(
            f"sampling.calls={config.calls} leaves too few calls beside the one of sampling.denoise_last='always'; raise it to "
            f"{_fewest_calls(config) + 1}"
        )


def _sigma_range(config: SamplingConfig, schedule: NoiseSchedule) -> tuple[float, float]:
    t_end = VP_T_END if isinstance(schedule, VP) else schedule.t_min
    low = float(schedule.sigma(t_end)) if config.sigma_min is None else config.sigma_min
    high = float(schedule.sigma(schedule.t_max)) if config.sigma_max is None else config.sigma_max
    if not 0 < low < high < math.inf:
        raise UserError(
            f"sampling.sigma_min={low:.6g} and sampling.sigma_max={high:.6g} must be finite, 0 < sigma_min < sigma_max"
        )
    return low, high


def _spacing(config: SamplingConfig, schedule: NoiseSchedule, low: float, high: float) -> Points:
    """Return the function that divides [start, end] evenly in the coordinate of the spacing."""
    to: Callable[[float], float]
    back: Callable[[float], float]
    if config.spacing == "log-snr":
        to, back = math.log, math.exp
    elif config.spacing == "time":
        to, back = lambda sigma: float(schedule.time(sigma)), lambda t: float(schedule.sigma(t))
    else:
        to, back = lambda sigma: sigma ** (1.0 / config.rho), lambda u: u**config.rho

    for name, sigma in (("sigma_min", low), ("sigma_max", high)):
        if not math.isclose(back(to(sigma)), sigma, rel_tol=1e-6):
            require(config.spacing != "edm", f"sampling.rho={config.rho:g} is too large for spacing 'edm'; 7 is usual")
            raise UserError(
                f"sampling.{name}={sigma:.6g} is reached at no time of the {schedule.kind} schedule; move it inside or "
                "use another sampling.spacing than 'time'"
            )

    def points(start: float, end: float, count: int) -> list[float]:
        first, last = to(start), to(end)
        return [start, *(back(first + (last - first) * i / count) for i in range(1, count)), end]

    return points


def _denoises_last(config: SamplingConfig, low: float) -> bool:
    """Return whether the output of a last call at sigma_min is the result; Heun ends at sigma 0 without one."""
    if config.solver == "heun" or config.denoise_last == "never":
        return False
    return config.denoise_last == "always" or (low >= VISIBLE and config.calls > _fewest_calls(config))


def _fewest_calls(config: SamplingConfig) -> int:
    return {"heun": 3, "ddim": 1}.get(config.solver, config.order)


def _singlestep_steps(config: SamplingConfig, calls: int, points: Points, low: float, high: float) -> list[Step]:
    """Return the steps of singlestep DPM-Solver.

    Calls are equidistant in the spacing's coordinate. Exception: with lower_final="published" and log-SNR spacing,
    steps have equal length. Inner points divide their step evenly in the same coordinate.
    """
    grid = points(high, low, calls)
    if config.lower_final == "published":
        orders = singlestep_orders(calls, config.order)
    else:
        orders = lowered_singlestep_orders(grid, config.order, config.solver)
    if config.spacing == "log-snr" and config.lower_final == "published":
        outer = points(high, low, len(orders))
    else:
        outer = [grid[i] for i in accumulate(orders, initial=0)]
    return [
        Step(calls=tuple(points(start, end, order)[:-1]), end=end, order=order)
        for (start, end), order in zip(pairwise(outer), orders, strict=True)
    ]


def _multistep_steps(config: SamplingConfig, sigmas: list[float]) -> list[Step]:
    if config.lower_final == "published":
        orders = multistep_orders(len(sigmas) - 1, config.order)
    else:
        orders = lowered_multistep_orders(sigmas, config.order, config.solver)
    return [Step(calls=(s,), end=t, order=o) for (s, t), o in zip(pairwise(sigmas), orders, strict=True)]


def _heun_steps(config: SamplingConfig, points: Points, low: float, high: float) -> list[Step]:
    """Return the steps of EDM's Algorithm 2 (S_min = 0, S_max = inf, S_noise = 1); without churn it is Algorithm 1."""
    count = (config.calls + 1) // 2
    sigmas = points(high, low, count - 1)
    corrected = set(range(count - 1))
    if config.lower_final == "always":
        while (found := corrected_heun_steps(sigmas, config.calls)) is None:
            sigmas = points(high, low, len(sigmas))
        corrected = found
    lift = 1.0 + min(config.churn / len(sigmas), math.sqrt(2.0) - 1.0)
    steps = []
    for i, (sigma, end) in enumerate(pairwise([*sigmas, 0.0])):
        start = sigma * lift
        calls = (start, end) if i in corrected else (start,)
        std = math.sqrt(start**2 - sigma**2)
        steps.append(Step(calls=calls, end=end, order=len(calls), noise_std=std))
    return steps


def _ddim_steps(sigmas: list[float], eta: float) -> list[Step]:
    """Return the steps of DDIM; the noise is eq. (16) of Song et al. 2021 divided by sqrt(alpha).

    noise_std = eta sigma_t sqrt(1 - sigma_t²/sigma_s²).
    """
    return [
        Step(calls=(s,), end=t, order=1, noise_std=eta * t * math.sqrt(1.0 - (t / s) ** 2)) for s, t in pairwise(sigmas)
    ]
