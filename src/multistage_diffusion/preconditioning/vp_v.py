"""Prediction of v on a variance-preserving schedule."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config.run import PRECONDITIONINGS
from .base import Coefficients
from .vp_eps import VPEps


@PRECONDITIONINGS.add("vp-v")
@dataclass(frozen=True)
class VPVelocity(VPEps):
    """F predicts v = s n - s sigma y (Salimans & Ho 2022, "Progressive distillation", appendix D): D = s² x - s sigma F(s x).

    c_noise as in noise prediction.
    """

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return s², -s sigma, s and the embedding's time, s = s(sigma)."""
        scale = self.schedule.scale(sigma)
        return Coefficients(scale**2, -scale * sigma, scale, self.noise(sigma))
