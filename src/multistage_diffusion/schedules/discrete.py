"""A schedule of integer steps, and the training density that draws each of them equally often."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ..contracts import as_float64
from ..errors import UserError
from .base import SCHEDULES, VariancePreserving
from .priors import PRIORS, SigmaPrior, clamp_half_open

_SPACINGS = ("sqrt", "linear", "cosine", "given")


@SCHEDULES.add("discrete")
@dataclass(frozen=True, kw_only=True)
class Discrete(VariancePreserving):
    """Steps 0 .. steps-1 with betas of one of these spacings.

    spacing "sqrt": from beta_start to beta_end, linearly in their square root (LDM). "linear": linearly (DDPM). "cosine":
    of alpha_bar = cos²((t + 0.008)/1.008 pi/2), t in [0, 1], but at most 0.999 (Nichol & Dhariwal 2021, "Improved
    denoising diffusion probabilistic models", eq. 17). "given": the numbers in `betas`. The last two ignore beta_start
    and beta_end.

    Between steps ln sigma is interpolated linearly; outside, times are clamped. A stage edge is an integer k,
    "steps below k | steps from k on"; its sigma is the geometric mean of the two neighbours'.
    """

    integer_time: ClassVar[bool] = True
    beta_start: float = 0.0015
    beta_end: float = 0.0195
    steps: int = 1000
    spacing: str = "sqrt"
    betas: tuple[float, ...] = ()
    t_min: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UserError(f"discrete schedule: steps={self.steps} must be at least 2")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise UserError(f"discrete schedule: need 0 < beta_start={self.beta_start} <= beta_end={self.beta_end} < 1")
        if self.spacing not in _SPACINGS:
            raise UserError(
                f"discrete schedule: spacing={self.spacing!r} must be one of {', '.join(map(repr, _SPACINGS))}"
            )
        if len(self.betas) != (self.steps if self.spacing == "given" else 0):
            raise UserError(
                f"discrete schedule: spacing={self.spacing!r} with {len(self.betas)} betas; spacing 'given' has one for each "
                f"of the {self.steps} steps, other spacings have none"
            )
        if not all(0 < beta < 1 for beta in self.betas):
            raise UserError("discrete schedule: all betas must be in (0, 1)")
        self._check_range()

    @property
    def t_max(self) -> float:  # type: ignore[override]
        """The last step."""
        return float(self.steps - 1)

    @cached_property
    def log_sigmas(self) -> Tensor:
        """Ln sigma of every step, float64 (steps,)."""
        log_alpha_bar = torch.cumsum(torch.log1p(-self._all_betas()), 0)
        return 0.5 * torch.log(torch.expm1(-log_alpha_bar))

    def _all_betas(self) -> Tensor:
        if self.spacing == "given":
            return torch.tensor(self.betas, dtype=torch.float64)
        if self.spacing == "cosine":
            t = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            alpha_bar = torch.cos((t + 0.008) / 1.008 * (math.pi / 2)) ** 2
            return (1.0 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
        power = 2 if self.spacing == "sqrt" else 1
        ends = self.beta_start ** (1 / power), self.beta_end ** (1 / power)
        return torch.linspace(*ends, self.steps, dtype=torch.float64) ** power

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

    def edge_sigma(self, t: float) -> float:
        """Return the geometric mean of sigma at steps t-1 and t."""
        if not (float(t).is_integer() and 1 <= t <= self.steps - 1):
            raise UserError(f"edge {t} of a discrete schedule must be an integer in 1..{self.steps - 1}")
        return float(torch.exp(self.log_sigmas[int(t) - 1 : int(t) + 1].mean()))

    def edge_time(self, sigma: float) -> float:
        """Return the first step at or above sigma (`steps` if there is none)."""
        return float(torch.searchsorted(self.sigmas, sigma))


@PRIORS.add("uniform-steps")
@dataclass(frozen=True, kw_only=True)
class UniformSteps(SigmaPrior):
    """Steps uniform on a discrete schedule."""

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
        return clamp_half_open(self.schedule.sigma(step), low, high)
