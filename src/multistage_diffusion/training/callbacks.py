"""Callbacks: the events of a trainer."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

TrainerT = TypeVar("TrainerT")


class Callback(Generic[TrainerT]):
    """Base class of callbacks, Callback[Trainer]; every method does nothing unless overridden.

    Attributes:
        everywhere: whether it is called on every process or only on the main process.
    """

    everywhere = False

    def started(self, trainer: TrainerT) -> None:
        """Training starts or resumes at trainer.step."""

    def chosen(self, trainer: TrainerT) -> None:
        """trainer.execution has been chosen; autotuning may have taken minutes."""

    def stepped(self, trainer: TrainerT) -> None:
        """One iteration is complete."""

    def logged(self, trainer: TrainerT, record: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def finished(self, trainer: TrainerT) -> None:
        """Training has ended: complete, stopped early with a checkpoint, or after an error."""
