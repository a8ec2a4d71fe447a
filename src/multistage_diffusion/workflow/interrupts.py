"""Ctrl-C during long work."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AGAIN = 0.2  # seconds after which work is interrupted again that went on


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Make Ctrl-C (or SIGTERM) call stop, which ends the work soon and in order; a second one ends it at once.

    Args:
        stop: called between two instructions of the work; what it raises interrupts the work there. It is called again if
            the work goes on after that, so it must raise only if the work is to be interrupted still.

    Raises:
        KeyboardInterrupt: if Ctrl-C, which reaches all processes of a terminal, has ended a compiler that torch.compile runs.
    """
    stopped: list[int] = []
    raised: list[BaseException] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return

    def handle(number: int, _: object) -> None:
        stopped.append(number)
        if sys.stderr.isatty():
            print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        restore()
        ask()  # last, because it may raise

    def ask(*_: object) -> None:
        try:
            stop()
        except BaseException as interruption:
            raised.append(interruption)
            signal.setitimer(signal.ITIMER_REAL, AGAIN)  # in a finaliser or a call from C, Python drops the exception
            raise

    def report(dropped: sys.UnraisableHookArgs) -> None:
        if not any(dropped.exc_value is interruption for interruption in raised):
            hook(dropped)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    alarm = signal.signal(signal.SIGALRM, ask)
    hook, sys.unraisablehook = sys.unraisablehook, report
    try:
        yield
    except Exception as error:
        if stopped and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise KeyboardInterrupt("interrupted while the network was compiled") from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)
        sys.unraisablehook = hook
        restore()
