"""Velocity prediction, in the time of rectified flow and as SiT counts it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..config.run import PRECONDITIONINGS
from .base import Coefficients, Preconditioning


@PRECONDITIONINGS.add("velocity")
@dataclass(frozen=True)
class Velocity(Preconditioning):
    """Rectified flow (Liu et al. 2023): F predicts n - y at x_t = (1-t) y + t n, t = sigma/(1 + sigma).

    c_noise is 999 t.
    """

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return 1-t, -t, 1-t and 999 t."""
        keep = 1.0 / (1.0 + sigma)
        return Coefficients(keep, -sigma * keep, keep, 999.0 * sigma * keep)


@PRECONDITIONINGS.add("velocity-sit")
@dataclass(frozen=True)
class SiTVelocity(Preconditioning):
    """SiT (Ma et al. 2024) on its linear path, whose time runs from noise to data: F predicts y - n at x_t = t y + (1-t) n.

    c_noise is t = 1/(1 + sigma) itself.
    """

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return t, 1-t, t and t."""
        keep = 1.0 / (1.0 + sigma)
        return Coefficients(keep, sigma * keep, keep, keep)
