"""Threads that compute in the background; those that decode many images let processes do it (see `processes`)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache, partial
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")

_AT_ONCE = 16  # most images of one task: few, so that an error or Ctrl-C ends the work soon
_BYTES = 2 << 20  # most bytes of one task's images, because some tasks are computed ahead


class Workers:
    """Threads that do tasks in the order in which they are submitted; they never delay the end of the process.

    Args:
        number: of threads.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        for _ in range(number):
            Thread(target=self._work, name="msdiff-decoding", daemon=True).start()

    def submit(self, task: Callable[[], T]) -> Future[T]:
        """Begin a task when a thread is free; return its future result."""
        future: Future[T] = Future()
        self._tasks.put((future, task))
        return future

    def _work(self) -> None:
        while True:
            future, task = self._tasks.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(task())
                except BaseException as error:
                    future.set_exception(error)
            del future, task  # frees the result while the thread waits


def workers() -> Workers:
    """Return the threads of this process: one per core that it may use, divided by the processes of a job on this machine."""
    return _of_process(os.getpid())  # a forked process has none of its parent's threads


@cache
def _of_process(_: int) -> Workers:
    job = os.environ.get("LOCAL_WORLD_SIZE", "")  # set by torchrun
    return Workers(max(1, usable_cores() // (int(job) if job.isdecimal() and int(job) else 1)))


def usable_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def task_size(image: int) -> int:
    """Return how many images of this many bytes make a task."""
    return max(1, min(_AT_ONCE, _BYTES // max(1, image)))


def each(work: Callable[[Sequence[int]], list[T]], numbers: Sequence[int], at_once: int = _AT_ONCE) -> Iterator[T]:
    """Yield the results of all numbers, in order; the workers compute a few tasks ahead.

    After an error, Ctrl-C or an early end of the iteration no further task is begun.

    Args:
        work: returns the results of a few numbers.
        numbers: the numbers.
        at_once: numbers of one task.

    Raises:
        Exception: the first that `work` raises, in the order of the numbers.
    """
    pool = workers()
    waiting: deque[Future[list[T]]] = deque()
    start = 0
    try:
        while waiting or start < len(numbers):
            while len(waiting) <= 2 * pool.number and start < len(numbers):
                waiting.append(pool.submit(partial(work, numbers[start : start + at_once])))
                start += at_once
            yield from waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
