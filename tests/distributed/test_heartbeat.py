from __future__ import annotations

import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from processes import Processes

from multistage_diffusion.distributed import RankLost, World, heartbeat
from multistage_diffusion.distributed.heartbeat import Heartbeat

NAMES = ["rank 0 (process 10 on here)", "rank 1 (process 11 on there)"]


@pytest.fixture
def pair(monkeypatch):
    """Make signs of life of rank 0 and, unless it is dead, rank 1, in one process; (rank 0's, rank 1's, exit codes)."""
    store, made, ends = dist.HashStore(), [], []
    monkeypatch.setattr(heartbeat, "GRACE", 0.2)
    monkeypatch.setattr(heartbeat, "LAST", 2.0)

    def make(*, dead: bool = False):
        for rank in range(1 if dead else 2):
            made.append(Heartbeat(store, rank, NAMES, every=0.05, patience=0.5, end=ends.append))
            made[-1].start()
        return *made, ends

    yield make
    for beat in made:
        beat.leave()


def until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_the_living_hear_one_another(pair):
    a, b, ends = pair()
    time.sleep(1.0)
    assert (a.reason, b.reason, ends) == ("", "", [])


def test_who_is_silent_is_lost_and_waiting_for_it_ends(pair, monkeypatch):
    said = []
    monkeypatch.setattr(sys, "stderr", SimpleNamespace(write=said.append, flush=lambda: None))
    a, ends = pair(dead=True)
    a.waiting = time.monotonic()
    assert until(lambda: bool(ends))
    assert ends == [2]
    assert a.reason.startswith(f"{NAMES[1]} is dead or hangs: no sign of life for ")
    (line,) = said  # in one piece, or lines of several processes mix
    assert line.startswith(f"msdiff: {a.reason}; ")
    assert line.endswith("checkpoint\n")


@pytest.mark.slow
def test_who_works_on_is_given_time_to_finish_what_needs_nobody(pair):
    a, ends = pair(dead=True)
    assert until(lambda: bool(a.reason))
    time.sleep(1.0)
    assert ends == []
    assert until(lambda: bool(ends))


def test_the_main_thread_that_asks_is_told_instead(pair, capfd):
    a, ends = pair(dead=True)
    assert NAMES[1] in a.explain()
    time.sleep(0.5)
    assert ends == []
    assert capfd.readouterr().err == ""


def test_an_error_of_another_cause_changes_nothing(pair):
    a, b, ends = pair()
    assert a.explain() == ""
    assert a.patience == 0.5
    b._stop.set()  # dies
    a.waiting = time.monotonic()
    assert until(lambda: bool(ends))
    assert a.reason.startswith(f"{NAMES[1]} is dead or hangs")


def test_who_leaves_is_not_missed(pair):
    a, b, ends = pair()
    b.leave()
    time.sleep(1.0)
    assert (a.reason, ends) == ("", [])


def test_who_has_left_but_is_waited_for_is_lost(pair):
    a, b, _ = pair()
    b.leave()
    a.waiting = time.monotonic()
    assert until(lambda: bool(a.reason))
    assert a.reason == f"{NAMES[1]} has ended, but is waited for"


def test_who_fails_says_why(pair):
    a, b, _ = pair()
    b.leave("a full disk")
    assert until(lambda: bool(a.reason))
    assert a.reason == f"{NAMES[1]} has failed: a full disk"


def test_rank_0_outlasts_the_others(pair):
    a, b, _ = pair()
    start = time.monotonic()
    a.outlast(1.5)
    assert time.monotonic() - start >= 1.5
    b.leave()
    a.outlast(60.0)
    assert time.monotonic() - start < 5.0


def test_rank_0_does_not_wait_for_the_dead(pair):
    a, _ = pair(dead=True)
    a.store.set("heartbeat/1", "7")
    start = time.monotonic()
    a.outlast(60.0)
    assert 0.5 <= time.monotonic() - start < 5.0


# -- processes --------------------------------------------------------------------------------------------------------


def waits(world: World) -> str:
    """Sum with the others for ever."""
    try:
        while True:
            world.all_reduce(torch.ones(2))
    except RankLost as error:
        return str(error)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="dead", marks=pytest.mark.slow),  # in quick tests, too: test_many_processes
        pytest.param(signal.SIGSTOP, id="hanging", marks=pytest.mark.slow),
    ],
)
def test_others_end_soon_and_name_the_lost_one(how):
    world = Processes(3, waits, patience=3.0)
    time.sleep(4.0)
    assert all(process.is_alive() for process in world.processes)
    start, lost = time.monotonic(), world.processes[1]
    os.kill(lost.pid, how)
    for process in (world.processes[0], world.processes[2]):
        process.join(60.0)
        assert process.exitcode in (0, 2)
    assert time.monotonic() - start < 30.0
    lost.kill()
    told = [str(r) for r in world.results(1.0) if r is not None]
    told += [line for line in world.errors() if line.startswith("msdiff: ")]
    assert len(told) == 2
    for line in told:
        assert f"rank 1 (process {lost.pid} on" in line
        assert "rerun the same command to go on from the last checkpoint" in line


def fails(world: World) -> str:
    if world.rank == 0:
        raise MemoryError("too large")
    return waits(world)


@pytest.mark.slow
def test_others_are_told_of_a_failure():
    world = Processes(2, fails, patience=3.0)
    first, second = world.results(30.0)
    assert isinstance(first, MemoryError)
    assert "has failed: too large" in str(second or world.errors())
