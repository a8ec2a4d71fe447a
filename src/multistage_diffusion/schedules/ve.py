"""The variance-exploding schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import as_float64
from ..errors import UserError
from .base import SCHEDULES, NoiseSchedule


@SCHEDULES.add("ve")
@dataclass(frozen=True, kw_only=True)
class VE(NoiseSchedule):
    """Variance exploding: sigma = sigma_min (sigma_max / sigma_min)^t, s = 1."""

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(f"ve schedule: need 0 < sigma_min={self.sigma_min} < sigma_max={self.sigma_max} < inf")

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * torch.exp(as_float64(t) * math.log(self.sigma_max / self.sigma_min))

    def time(self, sigma: float | Tensor) -> Tensor:
        """Return ln(sigma / sigma_min) / ln(sigma_max / sigma_min)."""
        return torch.log(as_float64(sigma) / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)
