"""The type of progress callbacks, and how a program shows that images are read."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

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
