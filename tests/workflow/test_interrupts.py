"""Ctrl-C during long work."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from multistage_diffusion.workflow.interrupts import stopped_by_signals


def failing(error: Exception, *, signalled: bool) -> None:
    """Raise an error in work that answers signals, if asked after Ctrl-C."""
    with stopped_by_signals(lambda: None):
        if signalled:
            signal.raise_signal(signal.SIGINT)
        raise error


@pytest.mark.parametrize("signalled", [True, False])
def test_a_compiler_that_ctrl_c_ended_is_an_interruption(signalled: bool) -> None:
    failure = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    with pytest.raises(KeyboardInterrupt if signalled else failure):
        failing(failure("C++ compile error"), signalled=signalled)


def test_other_errors_after_ctrl_c_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError(), signalled=True)


def test_what_the_handler_raises_interrupts_the_work() -> None:
    class GivenUp(BaseException):
        pass

    def stop() -> None:
        answers.append(signal.getsignal(signal.SIGINT))
        raise GivenUp

    answers, before = [], signal.getsignal(signal.SIGINT)
    with pytest.raises(GivenUp), stopped_by_signals(stop):
        signal.raise_signal(signal.SIGINT)
    assert answers == [before]  # a second Ctrl-C is answered as before


def test_an_interruption_that_python_drops_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    class GivenUp(BaseException):
        pass

    class Finalised:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    def stop() -> None:
        calls.append(time.monotonic())
        raise GivenUp

    def work() -> None:
        Finalised()  # Python drops what is raised here
        time.sleep(30)

    calls: list[float] = []
    reported: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", reported.append)
    before = signal.getsignal(signal.SIGALRM), sys.unraisablehook
    with pytest.raises(GivenUp), stopped_by_signals(stop):
        work()
    assert len(calls) == 2
    assert calls[1] - calls[0] < 10
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert reported == []
