import os
import threading
import time

import pytest

from multistage_diffusion.data import workers
from multistage_diffusion.data.workers import Workers, each, task_size, usable_cores

AT_ONCE = task_size(1)


def mapped(work):
    return lambda numbers: [work(number) for number in numbers]


def test_results_come_in_order_whatever_takes_how_long():
    def slow(number):
        time.sleep(0.002 * (number % 7 == 0))
        return number**2

    numbers = range(3, 203)
    assert list(each(mapped(slow), numbers)) == [n**2 for n in numbers]
    assert list(each(mapped(slow), range(0))) == []


def test_several_threads_compute_at_once(monkeypatch):
    pool = Workers(3)
    monkeypatch.setattr(workers, "workers", lambda: pool)
    barrier = threading.Barrier(3, timeout=10)  # passes when three wait at once
    found = list(each(mapped(lambda n: barrier.wait() >= 0 if n % AT_ONCE == 0 else True), range(3 * AT_ONCE)))
    assert found == [True] * 3 * AT_ONCE


def test_the_first_error_in_order_is_raised_and_nothing_more_is_begun():
    begun = []

    def work(number):
        begun.append(number)
        time.sleep(0.001)
        if number in (20, 21):
            raise ValueError(number)
        return number

    found = []
    with pytest.raises(ValueError, match="20"):
        found.extend(each(mapped(work), range(10_000)))
    assert found == list(range(16))  # the tasks before that of the error
    time.sleep(0.05)
    count = len(begun)
    assert count <= AT_ONCE * (2 * usable_cores() + 4)
    time.sleep(0.05)
    assert len(begun) == count


def test_an_iteration_that_ends_early_begins_nothing_more():
    begun = []
    for result in each(mapped(begun.append), range(10_000)):
        assert result is None
        break
    time.sleep(0.05)
    count = len(begun)
    assert count < 10_000
    time.sleep(0.05)
    assert len(begun) == count


def test_a_task_may_be_cancelled_before_it_begins():
    pool, gate = Workers(1), threading.Event()
    first = pool.submit(gate.wait)
    second = pool.submit(lambda: pytest.fail("a cancelled task ran"))
    assert second.cancel()
    gate.set()
    assert first.result(10)
    assert pool.submit(lambda: 5).result(10) == 5


def test_a_forked_process_has_workers_of_its_own():
    assert list(each(mapped(abs), range(20))) == list(range(20))
    child = os.fork()
    if child == 0:
        os._exit(0 if list(each(mapped(abs), range(20))) == list(range(20)) else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(("job", "number"), [("", 8), ("1", 8), ("3", 2), ("16", 1), ("0", 8), ("x", 8)])
def test_the_processes_of_a_job_share_the_cores(monkeypatch, job, number):
    monkeypatch.setattr(workers, "usable_cores", lambda: 8)
    monkeypatch.setattr(workers, "Workers", lambda number: number)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", job)
    assert workers._of_process.__wrapped__(0) == number


def test_tasks_of_large_images_are_small():
    assert [task_size(n) for n in (0, 1, 3 * 64 * 64, 3 * 512 * 512, 3 * 4000 * 3000)] == [16, 16, 16, 2, 1]
    done = []
    assert list(each(lambda numbers: [done.append(len(numbers))] * len(numbers), range(7), 3)) == [None] * 7
    assert sorted(done) == [1, 3, 3]
