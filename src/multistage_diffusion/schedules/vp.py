"""The variance-preserving schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import as_float64
from ..errors import UserError
from .base import SCHEDULES, VariancePreserving

_TINY = torch.finfo(torch.float64).tiny


@SCHEDULES.add("vp")
@dataclass(frozen=True, kw_only=True)
class VP(VariancePreserving):
    """Variance preserving: sigma = sqrt(exp(beta_d t²/2 + beta_min t) - 1), s = 1/sqrt(1 + sigma²)."""

    beta_d: float = 19.9
    beta_min: float = 0.1
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        if not (self.beta_d >= 0 and self.beta_min >= 0 and 0 < self.beta_d + self.beta_min < math.inf):
            raise UserError(f"vp schedule: beta_d={self.beta_d}, beta_min={self.beta_min} must be >= 0, not both zero")

    @property
    def t_end(self) -> float:
        """1e-4, the end of the paper's trajectories."""
        return 1e-4

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return sqrt(expm1(beta_d t²/2 + beta_min t))."""
        t = as_float64(t)
        return torch.sqrt(torch.expm1((0.5 * self.beta_d * t + self.beta_min) * t))

    def time(self, sigma: float | Tensor) -> Tensor:
        """Solve beta_d t²/2 + beta_min t = log1p(sigma²), in the form without cancellation."""
        exponent = torch.log1p(as_float64(sigma) ** 2)
        root = torch.sqrt(self.beta_min**2 + 2.0 * self.beta_d * exponent)
        return 2.0 * exponent / (self.beta_min + root).clamp(min=_TINY)  # 0/0 at sigma = 0 if beta_min = 0
