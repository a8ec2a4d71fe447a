"""Spacing in the log signal-to-noise ratio."""

from __future__ import annotations

import math

from ...config.sampling import SPACINGS
from .base import Spacing


@SPACINGS.add("log-snr")
class LogSNR(Spacing):
    """Even in ln sigma."""

    def to(self, sigma: float) -> float:
        """Return ln sigma."""
        return math.log(sigma)

    def back(self, u: float) -> float:
        """Return exp u."""
        return math.exp(u)
