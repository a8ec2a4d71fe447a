from contextlib import contextmanager

import pytest

from multistage_diffusion.data import options
from multistage_diffusion.data.options import Options
from multistage_diffusion.progress import shown_reading


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
    monkeypatch.setattr(options, "time", program)
    before = shown_reading.set(program.show)
    yield program
    shown_reading.reset(before)


def test_reading_is_told_every_tenth_of_a_second_and_at_the_end(program):
    with Options().reading(100) as told:
        assert program.open == 1
        for done in range(1, 101):
            program.now += 0.03
            told(done, 100)
    assert program.open == 0
    assert program.told == [(4 * i, 100) for i in range(1, 26)]
    program.told.clear()
    with Options().reading(3) as told:
        for done in range(1, 4):
            told(done, 3)
    assert program.told == [(3, 3)]


def test_a_callback_that_is_given_takes_the_place_of_what_the_program_shows(program):
    own = []
    with Options(progress=lambda done, total: own.append((done, total))).reading(2) as told:
        told(2, 2)
    assert (own, program.told, program.open) == ([(2, 2)], [], 0)


def test_one_image_is_not_worth_a_bar(program):
    with Options().reading(1) as told:
        told(1, 1)
    assert program.told == []
