"""Latent diffusion's own steps."""

from __future__ import annotations

from ...config.sampling import SPACINGS
from ...errors import UserError
from .time import Time


@SPACINGS.add("ldm")
class LDMSteps(Time):
    """The steps of latent diffusion's DDIM: 1, 1 + c, 1 + 2c, .. of N steps, c = N / calls; the end is step 0.

    In 20 calls on 1000 steps: 951, 901, .. 51, 1. Inside a step, even in time.
    """

    def ends(self, low: float, high: float, calls: int) -> tuple[float, float]:
        """Return sigma of step 0 and of the first step.

        Raises:
            UserError: for a schedule without steps, ends that are given, or calls that do not divide the steps.
        """
        if not self.schedule.integer_time:
            raise UserError(
                f"sampling.spacing='ldm': names steps of a discrete schedule, not of {self.schedule.kind!r}; use 'time'"
            )
        for name in ("sigma_min", "sigma_max"):
            if getattr(self.config, name) is not None:
                raise UserError(
                    f"sampling.{name}={getattr(self.config, name):g}: spacing 'ldm' has its own ends; leave it out, or use 'time'"
                )
        steps = round(self.schedule.t_max) + 1
        if not 2 <= calls <= steps // 2 or steps % calls:
            spent = "" if calls == self.config.calls else f" leaves {calls} with sampling.denoise_last, which"
            raise UserError(
                f"sampling.calls={self.config.calls}{spent} must be 2 to {steps // 2} and divide the schedule's {steps} steps "
                "for spacing 'ldm': latent diffusion makes another number of calls otherwise (give denoise_last=never, too)"
            )
        return self.back(0.0), self.back(1.0 + steps // calls * (calls - 1))

    def points(self, start: float, end: float, count: int) -> list[float]:
        """Return the sigmas of the steps from the first one to step 0; inside a step, sigmas that divide it evenly."""
        first = round(self.to(start))
        stride = (first - 1) // max(count - 1, 1)
        whole = end == self.back(0.0) and first == 1 + stride * (count - 1)
        if not whole:
            return super().points(start, end, count)
        return [start, *(self.back(1.0 + stride * i) for i in reversed(range(count - 1))), end]
