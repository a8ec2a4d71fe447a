"""Averages of the weights during training: exponential, counted in images, and of power-function profiles."""

from __future__ import annotations

import copy
import math
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def ema_decay(batch: int, images: int, halflife: float, rampup: float) -> float:
    """Return the decay of one iteration (Karras et al. 2022, Appendix F.2).

    Args:
        batch: images in the iteration.
        images: images seen before the iteration.
        halflife: images after which the contribution of old weights halves.
        rampup: the half-life is at most rampup * images; 0: no limit.
    """
    if rampup > 0:
        halflife = min(halflife, rampup * images)
    return math.exp2(-batch / max(halflife, 1e-8))


def power_exponent(sigma_rel: float) -> float:
    """Return the exponent gamma of a power-function profile of a given width (Karras et al. 2024, section 3.1).

    At time t, the profile weights the time tau by (gamma + 1) tau^gamma / t^(gamma + 1), tau from 0 to t. Its standard
    deviation is sigma_rel t with sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), which falls as gamma >= 0 rises.

    Args:
        sigma_rel: in (0, 12^-0.5); the upper end is the mean of all times (gamma = 0).
    """
    low, high = 0.0, 1.0 / sigma_rel
    while low < (middle := (low + high) / 2) < high:
        wider = middle + 1 > (sigma_rel * (middle + 2)) ** 2 * (middle + 3)
        low, high = (middle, high) if wider else (low, middle)
    return low


def power_decay(step: int, exponent: float) -> float:
    """Return the decay (1 - 1 / step)^(exponent + 1) of one iteration (Karras et al. 2024, equation 3).

    It makes the weight of iteration i at step t equal to the profile's integral over times i - 1 to i: the average is
    exactly that of weights which are constant between iterations.

    Args:
        step: of the iteration, from 1; the first one copies.
        exponent: gamma of the profile.
    """
    return 0.0 if step == 1 else math.exp((exponent + 1) * math.log1p(-1 / step))


class EMA(Generic[Module]):
    """A copy of a module whose parameters are the average of the module's; buffers are copied.

    Args:
        module: the module in training.
        halflife, rampup: see `ema_decay`.
        average: module of the same structure that is to hold the average; None: a copy of `module`.
    """

    def __init__(self, module: Module, halflife: float, rampup: float, average: Module | None = None) -> None:
        self.halflife, self.rampup = halflife, rampup
        self.module = (copy.deepcopy(module) if average is None else average).eval().requires_grad_(False)
        self.follow(module)

    def follow(self, module: Module) -> None:
        """Track the parameters of a module from now on; called again after parts of the module were replaced."""
        self._average: list[Tensor] = list(self.module.parameters())
        self._weights: list[Tensor] = list(module.parameters())
        self._buffers = (list(self.module.buffers()), list(module.buffers()))

    def decay(self, batch: int, images: int) -> float:
        """Return the decay of an iteration of `batch` images; `images` were seen before it."""
        return ema_decay(batch, images, self.halflife, self.rampup)

    @torch.no_grad()
    def update(self, batch: int, images: int) -> None:
        """Update the average after an iteration of `batch` images; `images` were seen before it."""
        torch._foreach_lerp_(self._average, self._weights, 1.0 - self.decay(batch, images))
        for mine, theirs in zip(*self._buffers, strict=True):
            mine.copy_(theirs)


class PowerEMA(EMA[Module]):
    """The average of a power-function profile. Time is counted in iterations, which all have the same number of images.

    Args:
        module, average: see `EMA`.
        sigma_rel: width of the profile, see `power_exponent`.
    """

    def __init__(self, module: Module, sigma_rel: float, average: Module | None = None) -> None:
        super().__init__(module, math.inf, 0.0, average)
        self.sigma_rel, self.exponent = sigma_rel, power_exponent(sigma_rel)

    def decay(self, batch: int, images: int) -> float:
        """Return the decay of an iteration of `batch` images; `images` were seen before it."""
        return power_decay(images // batch + 1, self.exponent)
