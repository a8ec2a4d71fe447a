"""What is logged of the steps between two log lines."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass
class RunningSums:
    """Losses and gradient norms since the last log line; part of a checkpoint, so that a resumed log is the same."""

    stages: int
    loss: list[float] = dataclasses.field(default_factory=list)
    rows: list[int] = dataclasses.field(default_factory=list)
    norm: dict[str, float] = dataclasses.field(default_factory=dict)
    seen: dict[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.loss = self.loss or [0.0] * self.stages
        self.rows = self.rows or [0] * self.stages

    def add(self, losses: Sequence[float | None], norms: dict[str, float]) -> None:
        """Add one optimiser step's mean losses (None: no rows) and gradient norms."""
        for k, loss in enumerate(losses):
            if loss is not None:
                self.loss[k] += loss
                self.rows[k] += 1
        for name, value in norms.items():
            if not math.isfinite(value):  # an fp16 step that the scaler skipped; JSON has no infinity
                continue
            self.norm[name] = self.norm.get(name, 0.0) + value
            self.seen[name] = self.seen.get(name, 0) + 1

    def means(self) -> tuple[list[float | None], dict[str, float]]:
        """Return the mean loss per stage (None: not seen) and the mean norm per part."""
        losses = [s / n if n else None for s, n in zip(self.loss, self.rows, strict=True)]
        return losses, {name: value / self.seen[name] for name, value in self.norm.items()}

    def clear(self) -> None:
        """Start a new interval."""
        self.__init__(self.stages)  # type: ignore[misc]
