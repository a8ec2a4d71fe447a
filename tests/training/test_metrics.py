from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from multistage_diffusion.training.metrics import (
    MetricAccumulator,
    MetricsReporter,
    StepMetrics,
    TrainingDiverged,
    refuse,
)
from multistage_diffusion.training.run import Run

CPU = torch.device("cpu")


def found(step: int, *values: float) -> StepMetrics:
    return StepMetrics(step, (2, 0), ("encoder",), torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("late", [False, True])
def test_everything_is_handed_on_in_order(late: bool) -> None:
    seen = []
    findings = MetricsReporter(CPU, lambda f, losses, norms: seen.append((f.step, losses, norms)), late=late)
    findings.add(found(1, 0.5, 0.0, 2.0))
    assert len(seen) == (0 if late else 1)
    findings.add(found(2, 0.25, 0.0, 3.0))
    assert len(seen) == (1 if late else 2)
    findings.settle()
    assert seen == [(1, [0.5, 0.0], {"encoder": 2.0}), (2, [0.25, 0.0], {"encoder": 3.0})]
    findings.settle()
    assert len(seen) == 2


def test_what_is_refused_is_not_handed_on_again() -> None:
    def refuse(f: StepMetrics, losses: list[float], norms: dict[str, float]) -> None:
        raise FloatingPointError(f"step {f.step}")

    findings = MetricsReporter(CPU, refuse, late=True)
    findings.add(found(1, math.nan, 0.0, 1.0))
    with pytest.raises(FloatingPointError, match="step 1"):
        findings.settle()
    findings.settle()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_a_number_that_is_not_finite_is_unfit(bad: float) -> None:
    assert found(1, 0.5, 0.0, 2.0).unfit == 0
    assert found(1, 0.5, 0.0, bad).unfit == 1
    assert found(1, bad, 0.0, 2.0).unfit == 1


def test_numbers_that_are_not_finite_are_named(tmp_path, tiny_config) -> None:
    run = Run.create(tmp_path / "run", tiny_config())
    refuse(run, 7, "loss", {"stage 1": 0.5})
    with pytest.raises(
        TrainingDiverged, match=r"the loss of stage 2, stage 3 is not finite at step 7; .* no checkpoint yet"
    ):
        refuse(run, 7, "loss", {"stage 1": 0.5, "stage 2": math.nan, "stage 3": math.inf})


def test_running_sums_survive_a_round_trip_and_leave_out_skipped_steps():
    sums = MetricAccumulator(2)
    sums.add([0.5, None], {"encoder": 2.0, "decoder.1": math.inf})
    sums.add([1.5, None], {"encoder": math.nan})
    again = MetricAccumulator(**dataclasses.asdict(sums))
    assert again.means() == ([1.0, None], {"encoder": 2.0})
    again.clear()
    assert again == MetricAccumulator(2)
