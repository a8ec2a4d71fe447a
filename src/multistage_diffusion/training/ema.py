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
        images: images seen before it.
        halflife: images after which an old weight counts half.
        rampup: the half-life is at most rampup * images; 0 turns this off.
    """
    if rampup > 0:
        halflife = min(halflife, rampup * images)
    return math.exp2(-batch / max(halflife, 1e-8))


class EMA(Generic[Module]):
    """A copy of a module whose parameters follow it; buffers are copied."""

    def __init__(self, module: Module, halflife: float, rampup: float) -> None:
        self.halflife, self.rampup = halflife, rampup
        self.module = copy.deepcopy(module).eval().requires_grad_(False)
        self.follow(module)

    def follow(self, module: Module) -> None:
        """Follow a module's parameters from now on: the same module's, once its parts have been exchanged."""
        self._average: list[Tensor] = list(self.module.parameters())
        self._weights: list[Tensor] = list(module.parameters())
        self._buffers = (list(self.module.buffers()), list(module.buffers()))

    @torch.no_grad()
    def update(self, batch: int, images: int) -> None:
        """Move towards the module's weights after an iteration of `batch` images, `images` seen before it."""
        torch._foreach_lerp_(self._average, self._weights, 1.0 - ema_decay(batch, images, self.halflife, self.rampup))
        for mine, theirs in zip(*self._buffers, strict=True):
            mine.copy_(theirs)
