"""The registry of trackers, and their base class.

One more module in this folder adds a tracker:

    @TRACKERS.add("csv")
    class CSV(Tracker):
        def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..registry import Registry


class Tracker:
    """Receives what a run logs; every method does nothing unless overridden.

    An instance is made before training starts; its __init__ raises UserError if a package is missing. The methods are
    called on the main process only.
    """

    def open(self, folder: Path, step: int) -> None:
        """Training starts or resumes at a step; what was received for later steps of this run is received again.

        Args:
            folder: the run's folder.
            step: steps done.
        """

    def config(self, config: dict[str, Any]) -> None:
        """Receive the run's configuration, once after `open`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Receive numbers of metrics.jsonl by name, such as "loss/train/stage 1", "lr", "gradient norm/encoder"."""

    def evaluation(self, step: int, petaflops: float, values: Mapping[str, float]) -> None:
        """Receive the values of an evaluation during training, such as "quality/frechet".

        Args:
            step: steps done.
            petaflops: training compute so far, in 1e15 operations.
            values: the values by name.
        """
        self.scalars(step, values)

    def images(self, step: int, grid: Image.Image) -> None:
        """Receive a grid of samples."""

    def close(self) -> None:
        """Training has ended, also after an error."""


TRACKERS: Registry[Callable[[], Tracker]] = Registry("track", __package__)
