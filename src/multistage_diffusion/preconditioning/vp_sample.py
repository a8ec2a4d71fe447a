"""Prediction of the clean data on a variance-preserving schedule."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config.run import PRECONDITIONINGS
from .base import Coefficients
from .vp_eps import VPEps


@PRECONDITIONINGS.add("vp-sample")
@dataclass(frozen=True)
class VPSample(VPEps):
    """The network predicts y itself from the scaled state: D = F(s x; c_noise); c_noise as in noise prediction."""

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return 0, 1, s(sigma) and the embedding's time."""
        return Coefficients(
            torch.zeros_like(sigma), torch.ones_like(sigma), self.schedule.scale(sigma), self.noise(sigma)
        )
