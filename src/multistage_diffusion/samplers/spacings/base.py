"""The base of all spacings."""

from __future__ import annotations

from abc import ABC, abstractmethod

from ...config import SamplingConfig
from ...schedules import NoiseSchedule


class Spacing(ABC):
    """A coordinate, a monotonic function of sigma, in which a trajectory is divided evenly.

    Args:
        config: the sampler's.
        schedule: the run's.
    """

    def __init__(self, config: SamplingConfig, schedule: NoiseSchedule) -> None:
        self.config, self.schedule = config, schedule

    @abstractmethod
    def to(self, sigma: float) -> float:
        """Return the coordinate of a sigma."""

    @abstractmethod
    def back(self, u: float) -> float:
        """Return the sigma of a coordinate."""

    def fault(self, name: str, sigma: float) -> str:
        """Return one line on why an end of the trajectory has no coordinate.

        Args:
            name: "sigma_min" or "sigma_max".
            sigma: its value, which `back(to(sigma))` differs from.
        """
        return f"sampling.{name}={sigma:.6g} cannot be reached in spacing {self.config.spacing!r}; take another spacing"

    def ends(self, low: float, high: float, calls: int) -> tuple[float, float]:
        """Return the sigmas at which a trajectory of so many calls ends and starts; here those of the configuration.

        Args:
            low: sampling.sigma_min, or the schedule's.
            high: sampling.sigma_max, or the schedule's.
            calls: denoiser calls of the solver, without a last one at the end.
        """
        return low, high

    def points(self, start: float, end: float, count: int) -> list[float]:
        """Return the count + 1 sigmas that divide start to end evenly; the ends are exact."""
        first, last = self.to(start), self.to(end)
        return [start, *(self.back(first + (last - first) * i / count) for i in range(1, count)), end]
