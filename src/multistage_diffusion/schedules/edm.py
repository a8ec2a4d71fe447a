"""EDM's schedule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..contracts import as_float64
from .base import SCHEDULES, NoiseSchedule


@SCHEDULES.add("edm")
@dataclass(frozen=True, kw_only=True)
class EDM(NoiseSchedule):
    """EDM: time is sigma itself, s = 1 (Karras et al. 2022, Table 1); t_min, t_max are its sampling range."""

    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        self._check_range()

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return t."""
        return as_float64(t)

    def time(self, sigma: float | Tensor) -> Tensor:
        """Return sigma."""
        return as_float64(sigma)
