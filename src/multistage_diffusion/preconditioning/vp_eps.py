"""Noise prediction, and what all predictions on variance-preserving schedules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..config import DiffusionConfig
from ..config.run import PRECONDITIONINGS
from ..errors import require
from ..schedules import SCHEDULES, NoiseSchedule, VariancePreserving
from .base import LEAST_SIGMA, Coefficients, Preconditioning


@PRECONDITIONINGS.add("vp-eps")
@dataclass(frozen=True)
class VPEps(Preconditioning):
    """Noise prediction on the scaled state (Ho et al. 2020; score_sde): D = x - sigma F(s x; c_noise).

    c_noise is 999 t, or the step itself on a schedule of integer steps.
    """

    schedule: NoiseSchedule

    @classmethod
    def of(cls, config: DiffusionConfig) -> Self:
        """Return noise prediction in the time of the configuration's schedule."""
        return cls(config.schedule)

    @classmethod
    def check(cls, config: DiffusionConfig) -> None:
        """Refuse schedules that are not variance preserving, and a density in the time of another schedule."""
        fitting = [kind for kind in SCHEDULES if issubclass(SCHEDULES[kind], VariancePreserving)]
        require(
            isinstance(config.schedule, VariancePreserving),
            f"diffusion.schedule={config.schedule.kind!r}: precondition {config.precondition!r} needs a variance-preserving "
            f"schedule "
            f"({', '.join(fitting)}); use precondition 'edm' or 'velocity' for the others",
        )
        require(
            getattr(config.prior, "schedule", config.schedule) == config.schedule,
            "diffusion.prior.schedule differs from diffusion.schedule, in whose time the network is told its noise; set both",
        )

    def noise(self, sigma: Tensor) -> Tensor:
        """Return the embedding's time."""
        time = self.schedule.time(sigma.clamp(min=LEAST_SIGMA))
        return time if self.schedule.integer_time else 999.0 * time

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return 1, -sigma, s(sigma) and the embedding's time."""
        return Coefficients(torch.ones_like(sigma), -sigma, self.schedule.scale(sigma), self.noise(sigma))
