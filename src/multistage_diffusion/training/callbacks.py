"""Callbacks: the events of a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """Base class of callbacks; every method does nothing unless overridden.

    Attributes:
        everywhere: whether it is called on every process or only on the main process.
    """

    everywhere = False

    def started(self, trainer: Trainer) -> None:
        """Training starts or resumes at trainer.step."""

    def chosen(self, trainer: Trainer) -> None:
        """trainer.execution has been chosen; autotuning may have taken minutes."""

    def stepped(self, trainer: Trainer) -> None:
        """One iteration is complete."""

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def finished(self, trainer: Trainer) -> None:
        """Training has ended: complete, stopped early with a checkpoint, or after an error."""
