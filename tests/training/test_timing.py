from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from multistage_diffusion.training.timing import PARTS, PassTimer, Timer

CPU = torch.device("cpu")


class Slow(torch.autograd.Function):
    """Takes so many seconds forward and backward."""

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        time.sleep(ctx.seconds)
        return grad, None


class Encoded:
    def __init__(self, h: torch.Tensor) -> None:
        self.h = h


class Encoder(nn.Module):
    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds, self.weight = seconds, nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> Encoded:
        return Encoded(Slow.apply(x * self.weight, self.seconds))


def test_a_timer_that_does_not_run_counts_nothing():
    timer = Timer(CPU)
    with timer.part("data"):
        time.sleep(0.01)
    assert timer.seconds() == dict.fromkeys(PARTS, 0.0)


def test_seconds_of_a_part_add_up_and_are_forgotten():
    timer = Timer(CPU)
    timer.running = True
    for _ in range(2):
        with timer.part("average"):
            time.sleep(0.05)
    found = timer.seconds()
    assert 0.1 <= found["average"] < 0.5
    assert sum(found.values()) == found["average"]
    assert timer.seconds() == dict.fromkeys(PARTS, 0.0)


@pytest.mark.parametrize("encoders", [1, 2])
def test_passes_are_divided_into_encoder_and_decoders(encoders):
    timer = Timer(CPU)
    timer.running = True
    passes, modules = PassTimer(timer), nn.ModuleList(Encoder(0.1 / encoders) for _ in range(encoders))
    passes.watch(modules)
    with passes.forward():
        out = sum(Slow.apply(m(torch.ones(3)).h, 0.3 / encoders) for m in modules)
    with passes.backward():
        out.sum().backward()
    found = timer.seconds()
    total = found["encoder"] + found["decoders"]
    assert 0.8 <= total < 1.5
    assert found["decoders"] >= 0.6 - (0.15 if encoders > 1 else 0.0)
    if encoders == 1:
        assert 0.2 <= found["encoder"] < 0.4


def test_modules_no_longer_watched_are_not_timed():
    timer = Timer(CPU)
    timer.running = True
    passes, module = PassTimer(timer), Encoder(0.0)
    passes.watch([module])
    passes.watch([])
    module(torch.ones(3))
    assert timer.seconds()["encoder"] == 0.0
