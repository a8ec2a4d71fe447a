"""The type of progress callbacks, how a program shows that images are read, and long operations that Ctrl-C ends."""

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")

Progress = Callable[[int, int], None]  # (done, total)

# What shows how many images are read where no callback is given; the command line sets it. None: nothing is shown.
shown_reading: ContextVar[Callable[[], AbstractContextManager[Progress]] | None] = ContextVar("reading", default=None)

_PAUSE = 0.1  # seconds between two calls of a callback
_PATIENCE = 1.0  # seconds before something is shown


@contextmanager
def reading(given: Progress | None = None) -> Iterator[Progress]:
    """Yield what tells a callback how many images are read: the last call, and others a tenth of a second apart.

    Args:
        given: the callback; None: what `shown_reading` shows, after the first second.
    """
    show = shown_reading.get() if given is None else None
    with nullcontext(given) if show is None else show() as callback:
        start = last = time.monotonic()
        quiet = given is None

        def told(done: int, total: int) -> None:
            nonlocal last, quiet
            now = time.monotonic()
            quiet = quiet and now - start < _PATIENCE
            if callback is not None and not quiet and (done == total or now - last >= _PAUSE):
                last = now
                callback(done, total)

        yield told


def interruptible(work: Callable[[], T]) -> T:
    """Return work(), computed in another thread, so that Ctrl-C is answered during one long operation of a library.

    The thread ends with the process; what it computes after Ctrl-C is dropped.
    """
    found: Future[T] = Future()
    context = contextvars.copy_context()

    def compute() -> None:
        try:
            found.set_result(context.run(work))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=compute, daemon=True).start()
    return found.result()
