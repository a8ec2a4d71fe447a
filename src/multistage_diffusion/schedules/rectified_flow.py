"""Rectified flow's schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import as_float64
from ..errors import UserError
from .base import SCHEDULES, NoiseSchedule


@SCHEDULES.add("rectified-flow")
@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(NoiseSchedule):
    """Rectified flow: x = (1 - t) y + t n, so sigma = t/(1 - t) and s = 1 - t; t stops where sigma = sigma_max."""

    t_min: float = 1e-3
    sigma_max: float = 1000.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_max < math.inf):
            raise UserError(f"rectified-flow schedule: sigma_max={self.sigma_max} must be positive and finite")
        self._check_range()

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The time at which sigma = sigma_max."""
        return self.sigma_max / (1.0 + self.sigma_max)

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return t/(1 - t), at most sigma_max."""
        t = as_float64(t)
        return torch.clamp(t / (1.0 - t.clamp(max=1.0)), max=self.sigma_max)

    def time(self, sigma: float | Tensor) -> Tensor:
        """Return sigma/(1 + sigma)."""
        sigma = as_float64(sigma)
        return sigma / (1.0 + sigma)

    def scale(self, sigma: float | Tensor) -> Tensor:
        """Return 1/(1 + sigma) = 1 - t."""
        return 1.0 / (1.0 + as_float64(sigma))
