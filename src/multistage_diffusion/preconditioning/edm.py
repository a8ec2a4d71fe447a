"""EDM's preconditioning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ..config import DiffusionConfig
from ..config.run import PRECONDITIONINGS
from .base import LEAST_SIGMA, Coefficients, Preconditioning


@PRECONDITIONINGS.add("edm")
@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """EDM (Karras et al. 2022, Table 1); c_noise = ln(sigma)/4."""

    sigma_data: float = 0.5

    @classmethod
    def of(cls, config: DiffusionConfig) -> Self:
        """Return EDM's preconditioning for the configuration's standard deviation of the data."""
        return cls(config.sigma_data)

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return c_skip, c_out, c_in and c_noise of Table 1."""
        data = self.sigma_data
        total = sigma**2 + data**2
        noise = 0.25 * torch.log(sigma.clamp(min=LEAST_SIGMA))
        return Coefficients(data**2 / total, sigma * data * total.rsqrt(), total.rsqrt(), noise)
