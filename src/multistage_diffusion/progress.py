"""The type of progress callbacks, and how a program shows the reading of a data set."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar

Progress = Callable[[int, int], None]  # (done, total)

# What shows how many files are read where no callback is given; the command line sets it. None: nothing is shown.
shown_reading: ContextVar[Callable[[], AbstractContextManager[Progress]] | None] = ContextVar("reading", default=None)
