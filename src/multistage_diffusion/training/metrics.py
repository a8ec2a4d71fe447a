"""Losses and gradient norms of the optimiser steps: transfer from the device, checks, and the training log."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import NotFiniteError
from . import checkpoint as ckpt

if TYPE_CHECKING:
    from .run import Run

# The loss scale starts at 2^16 and halves at every overflow; below this limit the scale is not the cause.
SMALLEST_SCALE = 2.0**-20


class TrainingDiverged(NotFiniteError):
    """A loss or gradient is not finite; the optimiser step was not taken."""


@dataclass(frozen=True)
class StepMetrics:
    """Losses and norms of one optimiser step.

    Attributes:
        step: number of the iteration, from 1.
        counts: rows of each stage.
        parts: names of the norms.
        values: the mean loss of every stage, then the norms; on the device.
    """

    step: int
    counts: tuple[int, ...]
    parts: tuple[str, ...]
    values: Tensor

    @property
    def unfit(self) -> Tensor:
        """A float32 scalar on the device: 1 if any value is not finite, else 0.

        An optimiser skips the step if its `found_inf` is 1.
        """
        return (~torch.isfinite(self.values).all()).to(torch.float32)


class MetricsReporter:
    """Reports the metrics of each step, immediately or one step later.

    The delay avoids a synchronisation with the device.

    Args:
        device: device of the training step.
        hand_on: called with the StepMetrics of a step, its losses, and its norms by name.
        late: whether to report one step later.
    """

    def __init__(
        self, device: torch.device, hand_on: Callable[[StepMetrics, list[float], dict[str, float]], None], *, late: bool
    ) -> None:
        self.late, self.hand_on, self.cuda = late, hand_on, device.type == "cuda"
        self._waiting: list[tuple[StepMetrics, Tensor, Any]] = []

    def add(self, found: StepMetrics) -> None:
        """Add the metrics of a step and report those that are due."""
        values, event = found.values, None
        if self.late and self.cuda:
            values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._waiting.append((found, values, event))
        self._hand_on(keep=1 if self.late else 0)

    def settle(self) -> None:
        """Report all pending metrics."""
        self._hand_on(keep=0)

    def _hand_on(self, keep: int) -> None:
        while len(self._waiting) > keep:
            found, values, event = self._waiting.pop(0)
            if event is not None:
                event.synchronize()
            numbers: list[float] = values.tolist()
            losses = numbers[: len(found.counts)]
            self.hand_on(found, losses, dict(zip(found.parts, numbers[len(losses) :], strict=True)))


def refuse(run: Run, step: int, what: str, values: Mapping[str, float]) -> None:
    """Raise TrainingDiverged if a value is not finite.

    Args:
        run: the run; the message names its latest checkpoint.
        step: step of the values, from 1.
        what: kind of the values, for the message.
        values: values by name.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        found = ckpt.list_checkpoints(run.checkpoints)
        kept = f"the checkpoint of step {ckpt.checkpoint_step(found[-1])} is intact" if found else "no checkpoint yet"
        raise TrainingDiverged(
            f"the {what} of {', '.join(bad)} is not finite at step {step}; stopped before the optimiser step, {kept}; start a "
            "new run with a lower optimizer.lr or training.precision=fp32"
        )


def refuse_scale(scale: float, step: int) -> None:
    """Raise TrainingDiverged if the fp16 loss scale has fallen below SMALLEST_SCALE by this step."""
    if scale < SMALLEST_SCALE:
        raise TrainingDiverged(
            f"fp16 gradients overflow at any loss scale at step {step}; start a run with training.precision=fp32"
        )


@dataclasses.dataclass
class MetricAccumulator:
    """Sums of losses and gradient norms since the last log line; saved in checkpoints, so a resumed log is the same."""

    stages: int
    loss: list[float] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    norm: dict[str, float] = dataclasses.field(default_factory=dict)
    seen: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loss = self.loss or [0.0] * self.stages
        self.rows = self.rows or [0] * self.stages

    def add(self, losses: Sequence[float | None], norms: dict[str, float]) -> None:
        """Add the mean losses (None: no rows) and gradient norms of one optimiser step."""
        for k, loss in enumerate(losses):
            if loss is not None:
                self.loss[k] += loss
                self.rows[k] += 1
        for name, value in norms.items():
            if not math.isfinite(value):  # the scaler skipped this fp16 step; JSON has no infinity
                continue
            self.norm[name] = self.norm.get(name, 0.0) + value
            self.seen[name] = self.seen.get(name, 0) + 1

    def means(self) -> tuple[list[float | None], dict[str, float]]:
        """Return the mean loss per stage (None: no rows) and the mean norm per part."""
        losses = [s / n if n else None for s, n in zip(self.loss, self.rows, strict=True)]
        return losses, {name: value / self.seen[name] for name, value in self.norm.items()}

    def clear(self) -> None:
        """Start a new interval."""
        self.__init__(self.stages)  # type: ignore[misc]


class TrainingLog:
    """Means of losses and gradient norms, and the training rate, since the last line of the log.

    Args:
        run: the run, for messages.
        device: device of the training.
        stages: number of stages.
        late: see MetricsReporter.
        scaled: whether gradients are scaled (fp16), so that they may overflow.

    Attributes:
        sums: running sums, saved in checkpoints.
        reporter: fetches the metrics of the steps.
    """

    def __init__(self, run: Run, device: torch.device, stages: int, *, late: bool, scaled: bool) -> None:
        self.run, self.scaled = run, scaled
        self.sums = MetricAccumulator(stages)
        self.reporter = MetricsReporter(device, self._note, late=late)
        self.restart(0)

    def restart(self, images: int) -> None:
        """Measure the rate from now on; `images` have been seen so far."""
        self._start, self._images = time.perf_counter(), images

    def exclude(self, seconds: float) -> None:
        """Exclude seconds from the rate."""
        self._start += seconds

    def record(self, step: int, images: int, lr: float) -> dict[str, Any]:
        """Return the line of an iteration for metrics.jsonl, and start a new interval.

        Raises:
            TrainingDiverged: if a loss or gradient is not finite.
        """
        self.reporter.settle()
        seconds = time.perf_counter() - self._start
        losses, norms = self.sums.means()
        record = {
            "kind": "train",
            "step": step,
            "images": images,
            "loss": losses,
            "grad_norm": norms,
            "lr": lr,
            "images_per_s": (images - self._images) / max(seconds, 1e-9),
            "seconds": seconds,
        }
        self.sums.clear()
        self.restart(images)
        return record

    def _note(self, found: StepMetrics, losses: list[float], norms: dict[str, float]) -> None:
        """Add a step's losses and norms to the running sums; raise TrainingDiverged if one is not finite."""
        refuse(self.run, found.step, "loss", {f"stage {k + 1}": loss for k, loss in enumerate(losses)})
        if not self.scaled:
            refuse(self.run, found.step, "gradient", norms)
        self.sums.add([x if c else None for x, c in zip(losses, found.counts, strict=True)], norms)
