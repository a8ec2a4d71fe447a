"""DDIM."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from ...config import SamplingConfig
from ...config.sampling import SOLVERS
from ..spacings import Spacing
from .base import AddNoise, Denoise, Solver, Step


@SOLVERS.add("ddim")
class DDIM(Solver):
    """DDIM with eta (Song et al. 2021, eq. 12, divided by sqrt(alpha)); the noise is added after the step."""

    noise: ClassVar[str] = "eta"
    clips: ClassVar[bool] = True

    @classmethod
    def steps(cls, config: SamplingConfig, calls: int, spacing: Spacing, low: float, high: float) -> list[Step]:
        """Return steps of one call; the noise is eq. (16) divided by sqrt(alpha): eta sigma_t sqrt(1 - sigma_t²/sigma_s²)."""
        return [
            replace(
                step,
                noise_std=config.eta * step.end * math.sqrt(1.0 - (step.end / step.calls[0]) ** 2),
                clip=config.clip,
            )
            for step in super().steps(config, calls, spacing, low, high)
        ]

    def step(self, x: Tensor, step: Step, denoise: Denoise, add_noise: AddNoise) -> Tensor:
        """Keep the denoised image and scale the noise down, all of it but what is added anew; only the image is clipped."""
        denoised = denoise(x, step.calls[0])
        direction = math.sqrt(step.end**2 - step.noise_std**2) / step.calls[0]
        noise = direction * (x - denoised)
        if step.clip is not None:
            denoised = denoised.clamp(-step.clip, step.clip)
        return add_noise(denoised + noise)
