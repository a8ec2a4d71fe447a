"""EDM's spacing."""

from __future__ import annotations

from ...config.sampling import SPACINGS
from .base import Spacing


@SPACINGS.add("edm")
class EDMSpacing(Spacing):
    """Even in sigma^(1/rho) (Karras et al. 2022, eq. 5)."""

    def to(self, sigma: float) -> float:
        """Return sigma^(1/rho)."""
        root: float = sigma ** (1.0 / self.config.rho)
        return root

    def back(self, u: float) -> float:
        """Return u^rho."""
        sigma: float = u**self.config.rho
        return sigma

    def fault(self, name: str, sigma: float) -> str:
        """Return that rounding leaves nothing of sigma at this rho."""
        return f"sampling.rho={self.config.rho:g} is too large for spacing 'edm'; 7 is usual"
