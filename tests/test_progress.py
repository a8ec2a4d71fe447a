import os
import signal
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from multistage_diffusion import progress
from multistage_diffusion.progress import interruptible, reading, shown_reading


class Program:
    """A program that shows the reading of images; its clock moves when a test says so."""

    def __init__(self) -> None:
        self.told, self.now, self.open = [], 0.0, 0

    def monotonic(self) -> float:
        return self.now

    @contextmanager
    def show(self):
        self.open += 1
        yield lambda done, total: self.told.append((done, total))
        self.open -= 1


@pytest.fixture(name="program")
def fixture_program(monkeypatch):
    program = Program()
    monkeypatch.setattr(progress, "time", program)
    before = shown_reading.set(program.show)
    yield program
    shown_reading.reset(before)


def test_reading_is_told_every_tenth_of_a_second_and_at_the_end(program):
    own = []
    with reading(lambda done, total: own.append((done, total))) as told:
        for done in range(1, 100):
            program.now += 0.03
            told(done, 99)
    assert own == [*((4 * i, 99) for i in range(1, 25)), (99, 99)]
    assert (program.told, program.open) == ([], 0)


def test_a_program_shows_what_takes_longer_than_a_second(program):
    with reading() as told:
        assert program.open == 1
        for done in range(1, 101):
            program.now += 0.25
            told(done, 100)
    assert program.open == 0
    assert program.told == [(done, 100) for done in range(4, 101)]
    program.told.clear()
    with reading() as told:
        for done in range(1, 4):
            program.now += 0.25
            told(done, 3)
    assert program.told == []


def test_without_a_program_nothing_is_shown():
    with reading() as told:
        told(1, 1)


def test_ctrl_c_is_answered_during_one_long_operation():
    def interrupt():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interruptible(lambda: torch.linalg.eigvalsh(torch.eye(1 << 12) + torch.rand(1 << 12, 1 << 12)))
    assert time.monotonic() - start < 1.5


def test_an_interruptible_operation_returns_and_raises():
    assert interruptible(lambda: 3) == 3
    assert interruptible(shown_reading.get) is shown_reading.get()
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 / 0)
