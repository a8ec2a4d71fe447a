"""Passes that may be compiled can be given up."""

from __future__ import annotations

import dataclasses

import pytest

from multistage_diffusion.training.callbacks import StepAbandoned
from multistage_diffusion.training.passes import Passes
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer


@pytest.fixture
def passes(tmp_path, tiny_config, tiny_data) -> Passes:
    made = Trainer(Run.create(tmp_path / "run", tiny_config()), tiny_data(), device="cpu").passes
    made.execution = dataclasses.replace(made.execution, compile=True)
    return made


def test_compiled_passes_end_where_they_are_given_up(passes: Passes) -> None:
    with pytest.raises(StepAbandoned), passes.abandonable(True):
        passes.abandon()
    with pytest.raises(StepAbandoned), passes.abandonable(True):  # and no others begin
        raise AssertionError("passes began")


@pytest.mark.parametrize(("allowed", "compiled"), [(False, True), (True, False)])
def test_other_passes_go_on(passes: Passes, allowed: bool, compiled: bool) -> None:
    passes.execution = dataclasses.replace(passes.execution, compile=compiled)
    with passes.abandonable(allowed):
        passes.abandon()
    passes.abandon()  # between passes nothing is interrupted


def test_an_error_in_the_place_of_the_interruption_counts_as_it(passes: Passes) -> None:
    with pytest.raises(ImportError), passes.abandonable(True):
        raise ImportError("on its own")

    def replaced() -> None:
        try:
            passes.abandon()
        except BaseException as error:
            raise ImportError("of a module written in C") from error

    with pytest.raises(StepAbandoned) as caught, passes.abandonable(True):
        replaced()
    assert isinstance(caught.value.__cause__, ImportError)
