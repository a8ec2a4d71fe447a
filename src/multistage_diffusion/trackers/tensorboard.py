"""TensorBoard (extra `track`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .registry import TRACKERS, Tracker, not_installed


@TRACKERS.add("tensorboard")
class TensorBoard(Tracker):
    """Writes events to RUN/tensorboard.

    Raises:
        UserError: if tensorboard is not installed.
    """

    def __init__(self) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise not_installed("tensorboard") from None
        self._make = SummaryWriter
        self._writer: Any = None
        self._by_flops: Any = None

    def open(self, folder: Path, step: int) -> None:
        """Open the event file; events after the resumed step are hidden (purge_step)."""
        self._folder, self._step = folder / "tensorboard", step
        self._writer = self._make(str(self._folder), purge_step=step + 1)

    def config(self, config: dict[str, Any]) -> None:
        """Write the configuration as text, and its numbers and words as hyper-parameters of the Fréchet distance."""
        # Markdown shows indented lines as they are
        text = "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines())
        self._writer.add_text("configuration", text, self._step + 1)
        from torch.utils.tensorboard.summary import hparams

        for summary in hparams(_flat(config), {"quality/frechet": 0.0}):
            self._writer.file_writer.add_summary(summary)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write each number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def evaluation(self, step: int, petaflops: float, values: Mapping[str, float]) -> None:
        """Write each value by step and, in a folder of its own, by compute."""
        self.scalars(step, values)
        teraflops = round(1000 * petaflops)
        if self._by_flops is None:
            # a separate folder: its purge_step counts tera-FLOPs, not training steps
            self._by_flops = self._make(str(self._folder / "by-flops"), purge_step=teraflops)
        for name, value in values.items():
            self._by_flops.add_scalar(f"{name} against tera-FLOPs", value, teraflops)

    def images(self, step: int, grid: Image.Image) -> None:
        """Write a grid of samples."""
        self._writer.add_image("samples", np.asarray(grid.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        """Close the event files."""
        for writer in (self._writer, self._by_flops):
            if writer is not None:
                writer.close()


def _flat(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Return the numbers and words of a configuration by dotted key; lists as text."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{where}{key}.")
        elif value is not None:
            flat[where + key] = value if isinstance(value, bool | int | float | str) else json.dumps(value)
    return flat
