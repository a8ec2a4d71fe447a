from __future__ import annotations

import pytest

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.serialization import override, to_dict
from multistage_diffusion.config.training import ExecutionConfig


def test_choices_are_yes_no_or_auto() -> None:
    config = override(RunConfig(), {"execution.channels_last": True, "execution.compile": False})
    assert (config.execution.channels_last, config.execution.compile) == (True, False)
    assert to_dict(RunConfig())["execution"]["cuda_graphs"] == "auto"
    with pytest.raises(ValueError, match=r"execution\.compile='on' must be true or false or one of 'auto'"):
        override(RunConfig(), {"execution.compile": "on"})


def test_thread_parallel_is_a_number_or_auto() -> None:
    assert override(RunConfig(), {"execution.thread_parallel": 4}).execution.thread_parallel == 4
    assert to_dict(RunConfig())["execution"]["thread_parallel"] == "auto"
    with pytest.raises(ValueError, match=r"execution\.thread_parallel=0 must be at least 1, or auto"):
        ExecutionConfig(thread_parallel=0)
    with pytest.raises(ValueError, match=r"execution\.thread_parallel='some' must be"):
        override(RunConfig(), {"execution.thread_parallel": "some"})


@pytest.mark.parametrize("field", ["recompute", "compile"])
def test_what_one_thread_at_a_time_does_is_refused_in_parallel_threads(field: str) -> None:
    ExecutionConfig(**{field: True}, thread_parallel=1)
    with pytest.raises(
        ValueError,
        match=rf"execution\.{field}=True and execution\.thread_parallel=2.*set execution\.thread_parallel to 1",
    ):
        ExecutionConfig(**{field: True}, thread_parallel=2)


def test_graphs_that_recompute_are_refused() -> None:
    ExecutionConfig(recompute=True)
    with pytest.raises(ValueError, match=r"execution\.recompute=True and execution\.cuda_graphs=True"):
        ExecutionConfig(recompute=True, cuda_graphs=True)
