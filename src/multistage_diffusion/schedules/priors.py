"""Training densities: from which sigma is drawn in training."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..contracts import as_float64
from ..errors import UserError
from ..registry import Registry
from .base import Kinds, NoiseSchedule
from .vp import VP

_TINY = torch.finfo(torch.float64).tiny


class SigmaPrior(ABC):
    """A density over sigma from which training noise is drawn, with exact restriction to an interval."""

    kind: ClassVar[str]

    @abstractmethod
    def mass(self, low: float, high: float) -> float:
        """Return the probability of [low, high)."""

    @abstractmethod
    def sample_within(self, u: Tensor, low: float, high: float) -> Tensor:
        """Map uniforms u in [0, 1) to draws from the density restricted to [low, high), by inverse CDF.

        Args:
            u: float64, any shape.
            low: lower edge, may be 0.
            high: upper edge, may be inf.

        Returns:
            sigma, float64, same shape, each in [low, high).

        Raises:
            UserError: if the interval holds no mass.
        """

    def sample(self, u: Tensor) -> Tensor:
        """Map uniforms to draws from the whole density."""
        return self.sample_within(u, 0.0, math.inf)

    def _empty(self, low: float, high: float) -> UserError:
        return UserError(f"stage [{low:.6g}, {high:.6g}) holds no mass of the {self.kind} prior; move its edges")


PRIORS: Registry[type[SigmaPrior]] = Kinds("diffusion.prior.kind", "multistage_diffusion.schedules")


def clamp_half_open(sigma: Tensor, low: float, high: float) -> Tensor:
    """Clamp draws that rounding moved onto or past an edge back into [low, high)."""
    return sigma.clamp(low, math.nextafter(high, 0.0) if math.isfinite(high) else torch.finfo(sigma.dtype).max)


@PRIORS.add("uniform-time")
@dataclass(frozen=True, kw_only=True)
class UniformTime(SigmaPrior):
    """Times uniform on a continuous schedule's [t_min, t_max]."""

    schedule: NoiseSchedule = VP()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.schedule.integer_time:
            raise UserError(
                f"uniform-time prior: schedule {self.schedule.kind!r} has integer steps; use prior 'uniform-steps'"
            )

    def _interval(self, low: float, high: float) -> tuple[float, float]:
        s = self.schedule
        clipped = (float(s.time(v)) if 0 < v < math.inf else (s.t_min if v <= 0 else s.t_max) for v in (low, high))
        start, end = (min(max(t, s.t_min), s.t_max) for t in clipped)
        return start, end

    def mass(self, low: float, high: float) -> float:
        """Return the share of [t_min, t_max] whose sigma lies in [low, high)."""
        start, end = self._interval(low, high)
        return max(end - start, 0.0) / (self.schedule.t_max - self.schedule.t_min)

    def sample_within(self, u: Tensor, low: float, high: float) -> Tensor:
        """Draw a time uniformly between the edges' times."""
        start, end = self._interval(low, high)
        if not start < end:
            raise self._empty(low, high)
        return clamp_half_open(self.schedule.sigma(start + as_float64(u) * (end - start)), low, high)


@PRIORS.add("log-normal")
@dataclass(frozen=True, kw_only=True)
class LogNormal(SigmaPrior):
    """ln sigma normal (Karras et al. 2022, eq. 11). For rectified flow this is the logit-normal density of t."""

    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        if not (0 < self.p_std < math.inf and math.isfinite(self.p_mean)):
            raise UserError(f"log-normal prior: need finite p_mean={self.p_mean} and positive p_std={self.p_std}")

    def _tail(self, low: float, high: float) -> tuple[float, float, float]:
        """Return the CDF at both edges, mirrored into the lower tail (where it is precise), and the mirror's sign."""
        z = [(math.log(v) - self.p_mean) / self.p_std if v > 0 else -math.inf for v in (low, high)]
        sign = -1.0 if z[0] > 0 else 1.0
        at_low, at_high = (0.5 * math.erfc(-sign * v / math.sqrt(2.0)) for v in z)  # torch's ndtr cancels in the tail
        return at_low, at_high, sign

    def mass(self, low: float, high: float) -> float:
        """Return Phi(z_high) - Phi(z_low), precise in both tails."""
        at_low, at_high, _ = self._tail(low, high)
        return abs(at_high - at_low) if low < high else 0.0

    def sample_within(self, u: Tensor, low: float, high: float) -> Tensor:
        """Draw by the inverse normal CDF between the edges' quantiles."""
        if not self.mass(low, high) > 0:
            raise self._empty(low, high)
        at_low, at_high, sign = self._tail(low, high)
        quantile = at_low + as_float64(u) * (at_high - at_low)
        z = sign * torch.special.ndtri(quantile.clamp(min=_TINY, max=1.0 - 2.0**-53))  # finite at u = 0 too
        return clamp_half_open(torch.exp(self.p_mean + self.p_std * z), low, high)
