"""Spacing in the schedule's time."""

from __future__ import annotations

from ...config.sampling import SPACINGS
from .base import Spacing


@SPACINGS.add("time")
class Time(Spacing):
    """Even in the time of the run's schedule."""

    def to(self, sigma: float) -> float:
        """Return the time of sigma."""
        return float(self.schedule.time(sigma))

    def back(self, u: float) -> float:
        """Return sigma at a time."""
        return float(self.schedule.sigma(u))

    def fault(self, name: str, sigma: float) -> str:
        """Return that the schedule does not reach this sigma."""
        return (
            f"sampling.{name}={sigma:.6g} is reached at no time of the {self.schedule.kind} schedule; move it inside or "
            "use another sampling.spacing than 'time'"
        )
