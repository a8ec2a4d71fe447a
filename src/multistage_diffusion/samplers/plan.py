"""The plan of a sampler, computed on the host before sampling: steps, their orders and every sigma in float64."""

from __future__ import annotations

import math

from ..config import SamplingConfig
from ..config.sampling import SOLVERS, SPACINGS
from ..errors import UserError
from ..schedules import NoiseSchedule
from .solvers import Plan, Solver, Step
from .spacings import Spacing

VISIBLE = 1 / 127.5  # sigma of one grey level for data in [-1, 1]


def make_plan(config: SamplingConfig, schedule: NoiseSchedule) -> Plan:
    """Return the plan of a sampler.

    It makes at most `calls` calls; DPM solvers and DDIM make them all. With config.denoise_last the last one is at
    sigma_min. sigma_max None is sigma(t_max) of the schedule; sigma_min None is sigma(t_end).

    Args:
        config: solver, order, calls, spacing, range and treatment of the last step.
        schedule: gives the default range, the time of spacing "time", and the standard deviation of the starting noise.

    Raises:
        UserError: for too few calls, an empty or impossible range, or churn or eta with a solver that does not use it.
    """
    solver: type[Solver] = SOLVERS[config.solver]
    fewest = solver.fewest_calls(config)
    _check(config, solver, fewest)
    low, high = _sigma_range(config, schedule)
    last = not solver.ends_at_zero and _denoises_last(config, fewest, low)
    spacing: Spacing = SPACINGS[config.spacing](config, schedule)
    low, high = spacing.ends(low, high, config.calls - last)
    _check_ends(spacing, low, high)
    steps = solver.steps(config, config.calls - last, spacing, low, high)
    if last:
        steps = [*steps, Step(calls=(low,), end=0.0, order=1, clip=config.clip if solver.clips else None)]
    return Plan(
        solver=config.solver,
        method=config.method,
        steps=tuple(steps),
        initial_noise_std=schedule.initial_noise_std(high),
    )


def _check(config: SamplingConfig, solver: type[Solver], fewest: int) -> None:
    for name in ("churn", "eta"):
        value = getattr(config, name)
        if value and solver.noise != name:
            owners = " or ".join(repr(owner) for owner in SOLVERS if SOLVERS[owner].noise == name)
            raise UserError(
                f"sampling.{name}={value} has no meaning for solver {config.solver!r}; set it to 0 or take {owners}"
            )
    if config.calls < fewest:
        of = f"sampling.order={config.order}" if solver.orders else f"solver {config.solver!r}"
        raise UserError(f"sampling.calls={config.calls} is too few for {of}; give at least {fewest}")
    if config.denoise_last == "always" and not solver.ends_at_zero and config.calls <= fewest:
        raise UserError(
            f"sampling.calls={config.calls} leaves too few calls beside the one of sampling.denoise_last='always'; raise it to "
            f"{fewest + 1}"
        )


def _sigma_range(config: SamplingConfig, schedule: NoiseSchedule) -> tuple[float, float]:
    low = float(schedule.sigma(schedule.t_end)) if config.sigma_min is None else config.sigma_min
    high = float(schedule.sigma(schedule.t_max)) if config.sigma_max is None else config.sigma_max
    if not 0 < low < high < math.inf:
        raise UserError(
            f"sampling.sigma_min={low:.6g} and sampling.sigma_max={high:.6g} must be finite, 0 < sigma_min < sigma_max"
        )
    return low, high


def _check_ends(spacing: Spacing, low: float, high: float) -> None:
    """Check that a spacing has coordinates of both ends."""
    for name, sigma in (("sigma_min", low), ("sigma_max", high)):
        if not math.isclose(spacing.back(spacing.to(sigma)), sigma, rel_tol=1e-6):
            raise UserError(spacing.fault(name, sigma))


def _denoises_last(config: SamplingConfig, fewest: int, low: float) -> bool:
    """Return whether the output of a last call at sigma_min is the result."""
    if config.denoise_last == "auto":
        return low >= VISIBLE and config.calls > fewest
    return config.denoise_last == "always"
