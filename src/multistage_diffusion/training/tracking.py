"""The callback through which trackers receive what a run logs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image

from ..config.serialization import to_dict
from ..trackers.registry import TRACKERS, Tracker, track
from .callbacks import Callback
from .trainer import Trainer


class Tracking(Callback[Trainer]):
    """Sends configuration, logged numbers and sample grids to trackers.

    Args:
        trackers: the trackers, newly made.
        names: their names, which the run keeps for when it is resumed; None: it keeps none.
    """

    def __init__(self, trackers: Sequence[Tracker], names: Sequence[str] | None = None) -> None:
        self.trackers, self.names = trackers, names

    @classmethod
    def of(cls, names: Sequence[str]) -> Tracking:
        """Return the callback for trackers by name.

        Raises:
            UserError: for an unknown name, or a package that is not installed.
        """
        once = tuple(dict.fromkeys(names))
        return cls([TRACKERS[name]() for name in once], once)

    def started(self, trainer: Trainer) -> None:
        """Open the trackers and send the configuration."""
        if self.names is not None:
            track(trainer.run.path, self.names)
        for tracker in self.trackers:
            tracker.open(trainer.run.path, trainer.step)
            tracker.config(to_dict(trainer.config))

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Send the numbers of a record."""
        values = numbers(record)
        if not values:
            return
        for tracker in self.trackers:
            if record["kind"] == "quality":
                tracker.evaluation(record["step"], record["petaflops"], values)
            else:
                tracker.scalars(record["step"], values)

    def images(self, step: int, grid: Image.Image) -> None:
        """Send a grid of samples."""
        for tracker in self.trackers:
            tracker.images(step, grid)

    def finished(self, trainer: Trainer) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl by name, without those that are null."""
    if record["kind"] == "quality":
        found = {"frechet": record["frechet"], **record.get("metrics", {})}
        named = {f"quality/{name}": value for name, value in found.items()}
    else:
        named = {f"loss/{record['kind']}/stage {k}": loss for k, loss in enumerate(record["loss"], start=1)}
        named |= {f"gradient norm/{name}": norm for name, norm in record.get("grad_norm", {}).items()}
        named |= {name: record[name] for name in ("lr", "images_per_s") if name in record}
    return {name: value for name, value in named.items() if value is not None}
