"""Layers that PyTorch computes slowly on a CPU: any network's layers can be replaced by these, which compute the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)

_masks: ContextVar[torch.Generator | None] = ContextVar("masks", default=None)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution that is a matrix product on the CPU.

    PyTorch's convolution converts the maps to another layout and back.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same maps as nn.Conv2d."""
        if x.device.type != "cpu":
            return super().forward(x)
        assert self.bias is not None
        weight = self.weight.flatten(1)
        if x.is_contiguous():
            product = torch.baddbmm(self.bias[:, None], weight.expand(len(x), *weight.shape), x.flatten(2))
            return product.view(len(x), -1, *x.shape[2:])
        return F.linear(x.permute(0, 2, 3, 1), weight, self.bias).permute(0, 3, 1, 2)


class Dropout(nn.Dropout):
    """Dropout whose masks are drawn quickly on the CPU, from a generator of their own inside `masks_from`."""

    def forward(self, x: Tensor) -> Tensor:
        """Map any shape to the same shape."""
        return dropout(x, self.p, self.training)


def dropout(x: Tensor, probability: float, training: bool) -> Tensor:
    """Zero random entries during training and scale the others up to keep the mean.

    torch draws a CPU mask on one thread with 64 random bits per entry, which takes up to a tenth of a training step.
    This function draws 16 bits per entry, so the probability is rounded to a multiple of 2^-16.

    Args:
        x: any shape.
        probability: in [0, 1).
        training: if false, x is returned unchanged.
    """
    if not training or probability == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    dropped = min(round(probability * 2**16), 2**16 - 1)
    words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None, generator=_masks.get())
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = torch.ge(bits, dropped - 2**15, out=torch.empty_like(x))
    return x * kept.div_(1 - dropped / 2**16)


@contextmanager
def masks_from(generator: torch.Generator) -> Iterator[None]:
    """Draw CPU dropout masks in this thread from `generator`.

    Threads that share torch's global generator draw from it in an undefined order.
    """
    before = _masks.set(generator)
    try:
        yield
    finally:
        _masks.reset(before)


def quicken(network: M) -> M:
    """Give a network's layers the methods of these classes, in place; names and weights stay as they are."""
    for module in network.modules():
        if type(module) is nn.Dropout and not module.inplace:
            module.__class__ = Dropout
        elif type(module) is nn.Conv2d and _is_pointwise(module):
            module.__class__ = PointwiseConv
    return network


def _is_pointwise(layer: nn.Conv2d) -> bool:
    plain = layer.stride == (1, 1) and layer.padding == (0, 0) and layer.groups == 1
    return layer.kernel_size == (1, 1) and plain and layer.bias is not None
