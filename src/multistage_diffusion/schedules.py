"""Noise schedules and training densities: the only place where a time becomes a sigma.

All other code describes noise by sigma, the noise-to-signal ratio of x = s(t) (y + sigma n); log-SNR is -2 ln sigma.
All formulas use float64 and expm1 / log1p, so they are accurate near both ends.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from .contracts import as_float64
from .errors import UserError

_TINY = torch.finfo(torch.float64).tiny


class NoiseSchedule(ABC):
    """A kernel's own time, mapped to and from sigma.

    Attributes:
        kind: name used in configurations.
        t_min, t_max: the domain of training times; sampling may go lower.
    """

    kind: ClassVar[str]
    t_min: float
    t_max: float

    @abstractmethod
    def sigma(self, t: float | Tensor) -> Tensor:
        """Return the noise-to-signal ratio at time t, float64, same shape."""

    @abstractmethod
    def time(self, sigma: float | Tensor) -> Tensor:
        """Return the time at which the noise-to-signal ratio is sigma, float64, same shape."""

    def scale(self, sigma: float | Tensor) -> Tensor:
        """Return s in x = s (y + sigma n), float64, same shape; 1 unless the kernel scales its data down."""
        return torch.ones_like(as_float64(sigma))

    def log_snr(self, t: float | Tensor) -> Tensor:
        """Return the log signal-to-noise ratio at time t: -2 ln sigma(t)."""
        return -2.0 * torch.log(self.sigma(t))

    def start_std(self, sigma: float) -> float:
        """Return the standard deviation of the unscaled noise at the start of a trajectory at sigma; here sigma."""
        return sigma

    def edge_sigma(self, t: float) -> float:
        """Return the sigma of a stage edge given in this schedule's time."""
        return float(self.sigma(t))

    def edge_time(self, sigma: float) -> float:
        """Return the time of a stage edge given as sigma (integer for discrete schedules)."""
        return float(self.time(sigma))

    def _check_range(self) -> None:
        if not 0 <= self.t_min < self.t_max < math.inf:
            raise UserError(f"{self.kind} schedule: need 0 <= t_min={self.t_min} < t_max={self.t_max} < inf")


@dataclass(frozen=True, kw_only=True)
class VP(NoiseSchedule):
    """Variance preserving: sigma = sqrt(exp(beta_d t²/2 + beta_min t) - 1), s = 1/sqrt(1 + sigma²)."""

    kind: ClassVar[str] = "vp"
    beta_d: float = 19.9
    beta_min: float = 0.1
    t_min: float = 1e-3
    t_max: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        if not (self.beta_d >= 0 and self.beta_min >= 0 and 0 < self.beta_d + self.beta_min < math.inf):
            raise UserError(f"vp schedule: beta_d={self.beta_d}, beta_min={self.beta_min} must be >= 0, not both zero")

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return sqrt(expm1(beta_d t²/2 + beta_min t))."""
        t = as_float64(t)
        return torch.sqrt(torch.expm1((0.5 * self.beta_d * t + self.beta_min) * t))

    def time(self, sigma: float | Tensor) -> Tensor:
        """Solve beta_d t²/2 + beta_min t = log1p(sigma²), in the form without cancellation."""
        exponent = torch.log1p(as_float64(sigma) ** 2)
        root = torch.sqrt(self.beta_min**2 + 2.0 * self.beta_d * exponent)
        return 2.0 * exponent / (self.beta_min + root).clamp(min=_TINY)  # 0/0 at sigma = 0 if beta_min = 0

    def scale(self, sigma: float | Tensor) -> Tensor:
        """Return 1/sqrt(1 + sigma²)."""
        return torch.rsqrt(1.0 + as_float64(sigma) ** 2)

    def start_std(self, sigma: float) -> float:
        """Return sqrt(1 + sigma²): the scaled state starts as unit noise."""
        return math.sqrt(1.0 + sigma * sigma)


@dataclass(frozen=True, kw_only=True)
class VE(NoiseSchedule):
    """Variance exploding: sigma = sigma_min (sigma_max / sigma_min)^t, s = 1."""

    kind: ClassVar[str] = "ve"
    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 1e-5
    t_max: float = 1.0

    def __post_init__(self) -> None:
        self._check_range()
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise UserError(f"ve schedule: need 0 < sigma_min={self.sigma_min} < sigma_max={self.sigma_max} < inf")

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return sigma_min (sigma_max / sigma_min)^t."""
        return self.sigma_min * torch.exp(as_float64(t) * math.log(self.sigma_max / self.sigma_min))

    def time(self, sigma: float | Tensor) -> Tensor:
        """Return ln(sigma / sigma_min) / ln(sigma_max / sigma_min)."""
        return torch.log(as_float64(sigma) / self.sigma_min) / math.log(self.sigma_max / self.sigma_min)


@dataclass(frozen=True, kw_only=True)
class EDM(NoiseSchedule):
    """EDM: time is sigma itself, s = 1 (Karras et al. 2022, Table 1); t_min, t_max are its sampling range."""

    kind: ClassVar[str] = "edm"
    t_min: float = 0.002
    t_max: float = 80.0

    def __post_init__(self) -> None:
        self._check_range()

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return t."""
        return as_float64(t)

    def time(self, sigma: float | Tensor) -> Tensor:
        """Return sigma."""
        return as_float64(sigma)


@dataclass(frozen=True, kw_only=True)
class RectifiedFlow(NoiseSchedule):
    """Rectified flow: x = (1 - t) y + t n, so sigma = t/(1 - t) and s = 1 - t; t stops where sigma = sigma_max."""

    kind: ClassVar[str] = "rectified-flow"
    t_min: float = 1e-3
    sigma_max: float = 1000.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_max < math.inf):
            raise UserError(f"rectified-flow schedule: sigma_max={self.sigma_max} must be positive and finite")
        self._check_range()

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The time at which sigma = sigma_max."""
        return self.sigma_max / (1.0 + self.sigma_max)

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return t/(1 - t), at most sigma_max."""
        t = as_float64(t)
        return torch.clamp(t / (1.0 - t.clamp(max=1.0)), max=self.sigma_max)

    def time(self, sigma: float | Tensor) -> Tensor:
        """Return sigma/(1 + sigma)."""
        sigma = as_float64(sigma)
        return sigma / (1.0 + sigma)

    def scale(self, sigma: float | Tensor) -> Tensor:
        """Return 1/(1 + sigma) = 1 - t."""
        return 1.0 / (1.0 + as_float64(sigma))


@dataclass(frozen=True, kw_only=True)
class Discrete(NoiseSchedule):
    """Steps 0 .. steps-1 with betas spaced linearly in their square root (LDM) or linearly (DDPM).

    Between steps ln sigma is interpolated linearly; outside, times are clamped. A stage edge is an integer k,
    "steps below k | steps from k on"; its sigma is the geometric mean of the two neighbours'.
    """

    kind: ClassVar[str] = "discrete"
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    steps: int = 1000
    spacing: str = "sqrt"
    t_min: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"discrete schedule: steps={self.steps} must be at least 2")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"discrete schedule: need 0 < beta_start={self.beta_start} <= beta_end={self.beta_end} < 1")
        if self.spacing not in ("sqrt", "linear"):
            raise UserError(f"discrete schedule: spacing={self.spacing!r} must be 'sqrt' or 'linear'")
        self._check_range()

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The last step."""
        return float(self.steps - 1)

    @cached_property
    def log_sigmas(self) -> Tensor:
        """Ln sigma of every step, float64 (steps,)."""
        power = 2 if self.spacing == "sqrt" else 1
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        betas = torch.linspace(*ends, self.steps, dtype=torch.float64) ** power
        log_alpha_bar = torch.cumsum(torch.log1p(-betas), 0)
        return 0.5 * torch.log(torch.expm1(-log_alpha_bar))

    @cached_property
    def sigmas(self) -> Tensor:
        """Sigma of every step, float64 (steps,)."""
        return torch.exp(self.log_sigmas)

    def sigma(self, t: float | Tensor) -> Tensor:
        """Return sigma at a step or between two."""
        t = as_float64(t)
        table = self.log_sigmas.to(t.device)
        t = t.clamp(0.0, self.t_max)
        low = t.floor().long().clamp(max=self.steps - 2)
        return torch.exp(torch.lerp(table[low], table[low + 1], t - low))

    def time(self, sigma: float | Tensor) -> Tensor:
        """Return the (fractional) step at which ln sigma is reached."""
        log_sigma = torch.log(as_float64(sigma))
        table = self.log_sigmas.to(log_sigma.device)
        high = torch.searchsorted(table, log_sigma.contiguous()).clamp(1, self.steps - 1)
        fraction = (log_sigma - table[high - 1]) / (table[high] - table[high - 1])
        return (high - 1 + fraction).clamp(0.0, self.t_max)

    def scale(self, sigma: float | Tensor) -> Tensor:
        """Return sqrt(alpha_bar) = 1/sqrt(1 + sigma²)."""
        return torch.rsqrt(1.0 + as_float64(sigma) ** 2)

    def start_std(self, sigma: float) -> float:
        """Return sqrt(1 + sigma²): the scaled state starts as unit noise."""
        return math.sqrt(1.0 + sigma * sigma)

    def edge_sigma(self, t: float) -> float:
        """Return the geometric mean of sigma at steps t-1 and t."""
        if not (float(t).is_integer() and 1 <= t <= self.steps - 1):
            raise UserError(f"edge {t} of a discrete schedule must be an integer in 1..{self.steps - 1}")
        return float(torch.exp(self.log_sigmas[int(t) - 1 : int(t) + 1].mean()))

    def edge_time(self, sigma: float) -> float:
        """Return the first step at or above sigma (`steps` if there is none)."""
        return float(torch.searchsorted(self.sigmas, sigma))


SCHEDULES: dict[str, type[NoiseSchedule]] = {c.kind: c for c in (VP, VE, EDM, RectifiedFlow, Discrete)}


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


def _clamp_half_open(sigma: Tensor, low: float, high: float) -> Tensor:
    """Clamp draws that rounding moved onto or past an edge back into [low, high)."""
    return sigma.clamp(low, math.nextafter(high, 0.0) if math.isfinite(high) else torch.finfo(sigma.dtype).max)


@dataclass(frozen=True, kw_only=True)
class UniformTime(SigmaPrior):
    """Times uniform on a continuous schedule's [t_min, t_max]."""

    kind: ClassVar[str] = "uniform-time"
    schedule: NoiseSchedule = VP()

    def __post_init__(self) -> None:
        if isinstance(self.schedule, Discrete):
            raise UserError("uniform-time prior: schedule 'discrete' has integer steps; use prior 'uniform-steps'")

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
        return _clamp_half_open(self.schedule.sigma(start + as_float64(u) * (end - start)), low, high)


@dataclass(frozen=True, kw_only=True)
class UniformSteps(SigmaPrior):
    """Steps uniform on a discrete schedule."""

    kind: ClassVar[str] = "uniform-steps"
    schedule: Discrete = Discrete()

    def _interval(self, low: float, high: float) -> tuple[int, int]:
        return int(self.schedule.edge_time(low)), int(self.schedule.edge_time(high))

    def mass(self, low: float, high: float) -> float:
        """Return the share of steps whose sigma lies in [low, high)."""
        first, last = self._interval(low, high)
        return max(last - first, 0) / self.schedule.steps

    def sample_within(self, u: Tensor, low: float, high: float) -> Tensor:
        """Draw one of the steps between the edges."""
        first, last = self._interval(low, high)
        if not first < last:
            raise self._empty(low, high)
        step = (first + as_float64(u) * (last - first)).floor().clamp(max=last - 1)
        return _clamp_half_open(self.schedule.sigma(step), low, high)


@dataclass(frozen=True, kw_only=True)
class LogNormal(SigmaPrior):
    """ln sigma normal (Karras et al. 2022, eq. 11). For rectified flow this is the logit-normal density of t."""

    kind: ClassVar[str] = "log-normal"
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
        return _clamp_half_open(torch.exp(self.p_mean + self.p_std * z), low, high)


PRIORS: dict[str, type[SigmaPrior]] = {c.kind: c for c in (UniformTime, UniformSteps, LogNormal)}
