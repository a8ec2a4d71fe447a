"""Steps of diffusers' DDIMScheduler."""

from __future__ import annotations

import math
from abc import abstractmethod

from ...config.sampling import SOLVERS, SPACINGS
from ...errors import UserError
from .time import Time


class DiffusersSteps(Time):
    """Steps of a discrete schedule, c = N // calls apart, the lowest of them below c.

    With sampling.denoise_last=always, the output at the lowest is the result (set_alpha_to_one). Else the trajectory ends
    at step 0; if that is the lowest itself, its call only bounds the image, and only DDIM makes it. Inside a step, even in
    time.
    """

    @abstractmethod
    def lowest(self, steps: int, apart: int) -> int:
        """Return the lowest step at which the network is called.

        Args:
            steps: of the schedule.
            apart: distance of the calls.

        Raises:
            UserError: if diffusers calls it at other steps.
        """

    def ends(self, low: float, high: float, calls: int) -> tuple[float, float]:
        """Return sigma of the lowest step, or of step 0, and of the highest.

        Raises:
            UserError: for a schedule without steps, a given sigma_max, or a number of calls that has no such steps.
        """
        config, name = self.config, self.config.spacing
        if not self.schedule.integer_time:
            raise UserError(
                f"sampling.spacing={name!r}: names steps of a discrete schedule, not of {self.schedule.kind!r}; use 'time'"
            )
        if config.sigma_max is not None:
            raise UserError(
                f"sampling.sigma_max={config.sigma_max:g}: spacing {name!r} has its own start; leave it out, or use 'time'"
            )
        steps = round(self.schedule.t_max) + 1
        if not 2 <= config.calls <= steps:
            raise UserError(
                f"sampling.calls={config.calls} must be 2 to {steps}, the schedule's steps, for spacing {name!r}"
            )
        apart = steps // config.calls
        lowest = self.lowest(steps, apart)
        highest = lowest + apart * (config.calls - 1)
        if not (lowest < apart and highest < steps):
            raise UserError(
                f"sampling.sigma_min={low:g}: is step {lowest}, but {config.calls} calls on {steps} steps are {apart} apart and "
                f"leave room for 0 to {min(apart, steps - highest + lowest) - 1} in spacing {name!r}; lower sigma_min or calls"
            )
        return self.back(float(lowest) if calls < config.calls else 0.0), self.back(float(highest))

    def points(self, start: float, end: float, count: int) -> list[float]:
        """Return the sigmas of the steps from the highest to the end; inside a step, sigmas that divide it evenly."""
        calls, steps = self.config.calls, round(self.schedule.t_max) + 1
        apart = steps // calls
        lowest, lands = self.lowest(steps, apart), count == calls - 1
        own = [self.back(float(lowest + apart * i)) for i in reversed(range(calls))]
        own = own if lands else [*own, self.back(0.0)]
        needless = not lands and lowest == 0 and not SOLVERS[self.config.solver].clips
        whole = not needless and (own[0], own[-1], len(own) - 1) == (start, end, count)
        return own if whole else super().points(start, end, count)


@SPACINGS.add("leading")
class Leading(DiffusersSteps):
    """timestep_spacing "leading": o, o + c, o + 2c, ..; steps_offset o is the step of sampling.sigma_min, else 0."""

    def lowest(self, steps: int, apart: int) -> int:
        """Return the step of sampling.sigma_min."""
        low = self.config.sigma_min
        if low is None:
            return 0
        step = round(self.to(low))
        if not math.isclose(self.back(float(step)), low, rel_tol=1e-6):
            raise UserError(
                f"sampling.sigma_min={low:g}: is at no step of the schedule, but spacing 'leading' needs one; the nearest is "
                f"{self.back(float(step)):.9g}"
            )
        return step


@SPACINGS.add("trailing")
class Trailing(DiffusersSteps):
    """timestep_spacing "trailing": N - 1, N - 1 - c, ..; calls divide N."""

    def lowest(self, steps: int, apart: int) -> int:
        """Return c - 1."""
        if self.config.sigma_min is not None:
            raise UserError(
                f"sampling.sigma_min={self.config.sigma_min:g}: spacing 'trailing' has its own end; leave it out, or use 'time'"
            )
        if steps % self.config.calls:
            raise UserError(
                f"sampling.calls={self.config.calls} must divide the schedule's {steps} steps for spacing 'trailing'"
            )
        return apart - 1
