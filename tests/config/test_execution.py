from __future__ import annotations

import pytest

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.execution import ExecutionConfig
from multistage_diffusion.config.serialization import override, to_dict


def test_choices_are_yes_no_or_auto() -> None:
    config = override(RunConfig(), {"execution.channels_last": True, "execution.compile": False})
    assert (config.execution.channels_last, config.execution.compile) == (True, False)
    assert to_dict(RunConfig())["execution"]["cuda_graphs"] == "auto"
    with pytest.raises(ValueError, match=r"execution\.compile='on' must be of type bool or one of 'auto'"):
        override(RunConfig(), {"execution.compile": "on"})


def test_shards_are_a_number_or_auto() -> None:
    assert override(RunConfig(), {"execution.shards": 4}).execution.shards == 4
    assert to_dict(RunConfig())["execution"]["shards"] == "auto"
    with pytest.raises(ValueError, match=r"execution\.shards=0 must be at least 1, or auto"):
        ExecutionConfig(shards=0)
    with pytest.raises(ValueError, match=r"execution\.shards='some' must be"):
        override(RunConfig(), {"execution.shards": "some"})


@pytest.mark.parametrize("field", ["recompute", "compile"])
def test_what_one_thread_at_a_time_does_is_refused_in_shards(field: str) -> None:
    ExecutionConfig(**{field: True}, shards=1)
    with pytest.raises(
        ValueError, match=rf"execution\.{field}=True and execution\.shards=2.*set execution\.shards to 1"
    ):
        ExecutionConfig(**{field: True}, shards=2)


def test_graphs_that_recompute_are_refused() -> None:
    ExecutionConfig(recompute=True)
    with pytest.raises(ValueError, match=r"execution\.recompute=True and execution\.cuda_graphs=True"):
        ExecutionConfig(recompute=True, cuda_graphs=True)
