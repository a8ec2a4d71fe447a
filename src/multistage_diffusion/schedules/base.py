"""The base of all noise schedules, and their registry."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..contracts import as_float64
from ..errors import UserError
from ..registry import Registry

T = TypeVar("T")
S = TypeVar("S")


class Kinds(Registry[T]):
    """A registry of classes that gives each its name as attribute `kind`; configurations are written with it."""

    def add(self, name: str) -> Callable[[S], S]:
        """Return a decorator that adds a class under a name; see Registry.add."""
        register = super().add(name)

        def added(cls: S) -> S:
            cls.kind = name  # type: ignore[attr-defined]
            return register(cls)

        return added


class NoiseSchedule(ABC):
    """A kernel's own time, mapped to and from sigma.

    Attributes:
        kind: name used in configurations; the one under which the class is registered.
        integer_time: whether a time is the number of a step.
        t_min, t_max: the domain of training times; sampling may go lower.
    """

    kind: ClassVar[str]
    integer_time: ClassVar[bool] = False
    t_min: float
    t_max: float

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Return the noise-to-signal ratio at time t, float64, same shape."""

    @abstractmethod
    def time(self, sigma: float | Tensor) -> Tensor:
        """Return the time at which the noise-to-signal ratio is sigma, float64, same shape."""

    @property
    def t_end(self) -> float:
        """The time at which sampling ends, unless sampling.sigma_min says otherwise; here t_min."""
        return self.t_min

    def scale(self, sigma: float | Tensor) -> Tensor:
        """Return s in x = s (y + sigma n), float64, same shape; 1 unless the kernel scales its data down."""
        return torch.ones_like(as_float64(sigma))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """Return the log signal-to-noise ratio at time t: -2 ln sigma(t)."""
        return -2.0 * torch.log(self.sigma(t))

    def initial_noise_std(self, sigma: float) -> float:
        """Return the standard deviation of the unscaled noise at the start of a trajectory at sigma; here sigma."""
        return sigma

    def edge_sigma(self, t: float) -> float:
        """Return the sigma of a stage edge given in this schedule's time."""
        return float(self.sigma(t))

    def edge_time(self, sigma: float) -> float:
        """Return the time of a stage edge given as sigma (integer for discrete schedules)."""
        return float(self.time(sigma))

    def _check_range(self) -> None:
        if not 0 <= self.t_min < self.t_max < math.inf:
            raise UserError(f"{self.kind} schedule: need 0 <= t_min={self.t_min} < t_max={self.t_max} < inf")


class VariancePreserving(NoiseSchedule):
    """A schedule with s = 1/sqrt(1 + sigma²): signal² + noise² = 1."""

    def scale(self, sigma: float | Tensor) -> Tensor:
        """Return 1/sqrt(1 + sigma²)."""
        return torch.rsqrt(1.0 + as_float64(sigma) ** 2)

    def initial_noise_std(self, sigma: float) -> float:
        """Return sqrt(1 + sigma²): the scaled state starts as unit noise."""
        return math.sqrt(1.0 + sigma * sigma)


SCHEDULES: Registry[type[NoiseSchedule]] = Kinds("diffusion.schedule.kind", "multistage_diffusion.schedules")
