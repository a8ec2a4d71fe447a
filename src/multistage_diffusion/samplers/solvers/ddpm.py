"""Ancestral sampling of DDPM."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from ...config import SamplingConfig
from ...config.sampling import SOLVERS
from ..spacings import Spacing
from .base import AddNoise, Denoise, Plan, Solver, Step, first_order

FEW_CALLS = (
    500  # Song et al. 2021, Table 1: at 100 calls its Fréchet distance is 1.4 to 2.4 times DDIM's, at 1000 about DDIM's
)


@SOLVERS.add("ddpm")
class DDPM(Solver):
    """DDPM (Ho et al. 2020, eq. 6 and 7, divided by sqrt(alpha_bar)); its noise has the posterior's variance.

    With every step of a discrete schedule, this is diffusers' DDPMScheduler with variance_type fixed_small. Without clipping it
    is DDIM with eta 1.
    """

    clips = True

    @classmethod
    def steps(cls, config: SamplingConfig, calls: int, spacing: Spacing, low: float, high: float) -> list[Step]:
        """Return steps of one call, with noise of the solver's variance."""
        return [
            replace(step, noise_std=cls.noise_std(step, spacing), clip=config.clip)
            for step in super().steps(config, calls, spacing, low, high)
        ]

    @classmethod
    def noise_std(cls, step: Step, spacing: Spacing) -> float:
        """Return the standard deviation of a step's noise in the unscaled state."""
        start, end = step.calls[0], step.end
        return end * math.sqrt(1.0 - (end / start) ** 2)

    def step(self, x: Tensor, step: Step, denoise: Denoise, add_noise: AddNoise) -> Tensor:
        """Draw from the posterior of the state at the end, given the state and the denoised image, which may be clipped."""
        denoised = denoise(x, step.calls[0])
        if step.clip is not None:
            denoised = denoised.clamp(-step.clip, step.clip)
        return add_noise(first_order(x, denoised, (step.end / step.calls[0]) ** 2))

    @classmethod
    def shortcoming(cls, plan: Plan) -> str | None:
        """Return that the calls are few."""
        if len(plan.calls) < FEW_CALLS:
            return f"{plan.solver}: {len(plan.calls)} calls are few for it, so that ddim may be better; consider 1000"
        return None


@SOLVERS.add("ddpm-large")
class DDPMLarge(DDPM):
    """DDPM with the variance of the forward step, beta; diffusers' variance_type fixed_large."""

    @classmethod
    def noise_std(cls, step: Step, spacing: Spacing) -> float:
        """Return the standard deviation of the noise of a forward step, s(start) sqrt(start² - end²), divided by s(end)."""
        start, end = step.calls[0], step.end
        left = float(spacing.schedule.scale(start)) / float(spacing.schedule.scale(end))
        return left * math.sqrt(start**2 - end**2)
