"""Ctrl-C during long work."""

from __future__ import annotations

import signal

import pytest

from multistage_diffusion.workflow.interrupts import stopped_by_signals


@pytest.mark.parametrize("ended", [True, False])
def test_a_compiler_that_ctrl_c_ended_is_an_interruption(ended: bool) -> None:
    failure = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    stops: list[int] = []
    with pytest.raises(KeyboardInterrupt if ended else failure), stopped_by_signals(lambda: stops.append(1)):
        if ended:
            signal.raise_signal(signal.SIGINT)
        raise failure("C++ compile error")
    assert len(stops) == ended


def test_other_errors_after_ctrl_c_stay_what_they_are() -> None:
    with pytest.raises(ZeroDivisionError), stopped_by_signals(lambda: None):
        signal.raise_signal(signal.SIGINT)
        raise ZeroDivisionError
