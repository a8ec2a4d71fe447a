"""Callbacks: what a trainer calls at the events of a training, and what they may answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

if TYPE_CHECKING:
    from ..progress import Progress

TrainerT = TypeVar("TrainerT", contravariant=True)


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """Result of an evaluation; the trainer logs it and writes a checkpoint of the step.

    Attributes:
        record: a line for metrics.jsonl. Its "seconds" are excluded from the training rate.
        quality: Fréchet distance of the samples of the step's EMA weights, by which the best checkpoint is chosen; None:
            unknown.
        stop_reason: why training ends after this step; "": it does not.
    """

    record: dict[str, Any]
    quality: float | None = None
    stop_reason: str = ""


class StopRequested(Exception):
    """Work between two steps is given up, because the training is to stop."""


class StepAbandoned(BaseException):
    """The passes of a step are given up, because the training is to stop; no Exception, which compilers catch and replace."""


def between_steps(trainer: Any, what: str) -> Progress:
    """Return a progress callback for work between two steps: callbacks show it, and a stop ends it by StopRequested.

    Several processes do such work together, and learn of a stop only after a step.

    Args:
        trainer: the trainer.
        what: the work, as in "evaluating".
    """

    def tell(done: int, total: int) -> None:
        if trainer.stopping and trainer.world.size == 1:
            raise StopRequested
        for callback in trainer.callbacks:
            callback.busy(trainer, what, done, total)

    return tell


class Callback(Protocol[TrainerT]):
    """Callbacks of a trainer, Callback[Trainer]; a method that is not overridden does nothing.

    Attributes:
        everywhere: whether it is called on every process or only on the main process. One that answers must be called
            on every process, and answer the same on all.
    """

    everywhere: bool = False

    def started(self, trainer: TrainerT) -> str | None:
        """Training starts or resumes at trainer.step; a text that is returned says why it ends before the first step."""
        return None

    def resumed(self, trainer: TrainerT) -> Evaluated | None:
        """Training goes on from a checkpoint; return the evaluation of its weights that a stop has left out."""
        return None

    def chosen(self, trainer: TrainerT) -> None:
        """The trainer has chosen its execution; autotuning may have taken minutes."""
        return

    def stepped(self, trainer: TrainerT) -> Evaluated | None:
        """One iteration is complete; return an evaluation of its weights, if there is one."""
        return None

    def busy(self, trainer: TrainerT, what: str, done: int, total: int) -> None:
        """Work between two steps, such as an evaluation, has come so far."""
        return

    def logged(self, trainer: TrainerT, record: dict[str, Any]) -> None:
        """A line was added to metrics.jsonl."""
        return

    def finished(self, trainer: TrainerT) -> None:
        """Training has ended: complete, stopped early with a checkpoint, or after an error."""
        return
