"""Exponential moving average of the weights, counted in images."""

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


class EMA(Generic[Module]):
    """A copy of a module whose parameters are the EMA of the module's; buffers are copied.

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

    @torch.no_grad()
    def update(self, batch: int, images: int) -> None:
        """Update the average after an iteration of `batch` images; `images` were seen before it."""
        torch._foreach_lerp_(self._average, self._weights, 1.0 - ema_decay(batch, images, self.halflife, self.rampup))
        for mine, theirs in zip(*self._buffers, strict=True):
            mine.copy_(theirs)
