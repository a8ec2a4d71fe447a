from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from multistage_diffusion.performance.timing import PARTS, PassTimer, Timer

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """Make time that passes only when it is told to."""

    class Clock:
        seconds = 0.0

        def wait(self, seconds: float) -> None:
            self.seconds += seconds

    made = Clock()
    monkeypatch.setattr(Timer, "now", lambda _: made.seconds)
    monkeypatch.setattr(Slow, "clock", made)
    return made


class Slow(torch.autograd.Function):
    """Takes so many seconds forward and twice as many backward."""

    clock = None

    @staticmethod
    def forward(ctx, x, seconds):
        ctx.seconds = seconds
        Slow.clock.wait(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Slow.clock.wait(2 * ctx.seconds)
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


def test_a_timer_that_does_not_run_counts_nothing(clock):
    timer = Timer(CPU)
    with timer.part("data"):
        clock.wait(1.0)
    assert timer.seconds() == dict.fromkeys(PARTS, 0.0)


def test_seconds_of_a_part_add_up_and_are_forgotten(clock):
    timer = Timer(CPU)
    timer.running = True
    for seconds in (1.0, 2.0):
        with timer.part("average"):
            clock.wait(seconds)
        clock.wait(100.0)
    assert timer.seconds() == {**dict.fromkeys(PARTS, 0.0), "average": 3.0}
    assert timer.seconds() == dict.fromkeys(PARTS, 0.0)


@pytest.mark.parametrize("encoders", [1, 2])
def test_passes_are_divided_into_encoder_and_decoders(clock, encoders):
    timer = Timer(CPU)
    timer.running = True
    passes, modules = PassTimer(timer), nn.ModuleList(Encoder(1.0) for _ in range(encoders))
    passes.watch(modules)
    for _ in range(2):  # the second step has nothing of the first
        with passes.forward():
            out = sum(Slow.apply(m(torch.ones(3)).h, 10.0) for m in modules)
            clock.wait(0.5)  # the loss
        assert timer.seconds() == {
            **dict.fromkeys(PARTS, 0.0),
            "encoder": 1.0 * encoders,
            "decoders": 10.0 * encoders + 0.5,
        }
        with passes.backward():
            out.sum().backward()
        found = timer.seconds()
        assert found["encoder"] + found["decoders"] == 22.0 * encoders
        # of separate networks, whose passes take turns, the last turn is known
        assert found["encoder"] == 2.0


def test_other_threads_are_not_counted(clock):
    timer, told = Timer(CPU), []
    timer.running = True
    passes, module = PassTimer(timer), Encoder(1.0)
    passes.watch([module])

    def other() -> None:
        told.append(timer.running)
        with timer.part("data"):
            clock.wait(1.0)
        with passes.forward():
            out = module(torch.ones(3)).h.sum()
        with passes.backward():
            out.backward()

    with passes.forward():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert told == [False]
    assert timer.seconds() == {**dict.fromkeys(PARTS, 0.0), "decoders": 4.0}  # this thread has waited
    timer.running = False
    assert not timer.running


def test_modules_no_longer_watched_are_not_timed(clock):
    timer = Timer(CPU)
    timer.running = True
    passes, module = PassTimer(timer), Encoder(1.0)
    passes.watch([module])
    passes.watch([])
    with passes.forward():
        module(torch.ones(3))
    assert timer.seconds()["encoder"] == 0.0
