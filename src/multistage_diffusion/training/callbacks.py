"""What may happen beside training: the events of a trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer import Trainer


class Callback:
    """What may happen beside training; every method does nothing unless overridden.

    Attributes:
        everywhere: whether it is called on every process, or only on that which writes the run.
    """

    everywhere = False

    def started(self, trainer: Trainer) -> None:
        """Training begins (or goes on) at trainer.step."""

    def chosen(self, trainer: Trainer) -> None:
        """How steps are going to be computed is known, trainer.execution; a trial may have taken a while."""

    def stepped(self, trainer: Trainer) -> None:
        """One iteration has been done."""

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""

    def finished(self, trainer: Trainer) -> None:
        """Training is over: at its end, stopped early with a checkpoint, or by an error."""
