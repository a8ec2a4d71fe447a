"""TensorBoard (extra `track`)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .registry import TRACKERS, Tracker


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
            raise UserError("tensorboard is not installed: pip install 'multistage-diffusion[track]'") from None
        self._make = SummaryWriter
        self._writer: Any = None
        self._by_flops: Any = None

    def open(self, folder: Path, step: int) -> None:
        """Open the event file; events after the resumed step are hidden (purge_step)."""
        self._folder, self._step = folder / "tensorboard", step
        self._writer = self._make(str(self._folder), purge_step=step + 1)

    def config(self, config: dict[str, Any]) -> None:
        """Write the configuration as text."""
        # Markdown shows indented lines as they are
        text = "\n".join(f"    {line}" for line in json.dumps(config, indent=2).splitlines())
        self._writer.add_text("configuration", text, self._step + 1)

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
