"""Trackio (extra `trackio`, and the package without its dependencies): a local dashboard, or one on Hugging Face."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

from .registry import TRACKERS, Tracker, not_installed, recall, remember

PROJECT = "multistage-diffusion"  # unless TRACKIO_PROJECT names another


@TRACKERS.add("trackio")
class Trackio(Tracker):
    """Writes everything to Trackio's local store, which `trackio show` displays; a run that is resumed goes on there, too.

    TRACKIO_DIR and TRACKIO_SPACE_ID choose another place. The run has the folder's name and some random letters, because
    runs of one name are one run there.

    Raises:
        UserError: if trackio is not installed.
    """

    def __init__(self) -> None:
        try:
            import trackio
        except ImportError:
            raise not_installed("trackio") from None
        self._trackio: Any = trackio
        self._run: Any = None
        self._config: dict[str, Any] = {}

    def open(self, folder: Path, step: int) -> None:
        """Choose the run's name, or find that of the run that this folder has started; `config` starts it."""
        known = recall(folder, "trackio")
        self._name = known.get("name") or f"{folder.name}-{secrets.token_hex(3)}"
        remember(folder, "trackio", {"name": self._name})

    def config(self, config: dict[str, Any]) -> None:
        """Start the run with the configuration as hyper-parameters, or go on with it."""
        with redirect_stdout(sys.stderr):  # it prints a greeting
            self._run = self._trackio.init(
                project=os.environ.get("TRACKIO_PROJECT", PROJECT),
                name=self._name,
                config=config,
                resume="allow",
                embed=False,
            )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write the numbers of a step."""
        self._run.log(dict(values), step=step)

    def evaluation(self, step: int, petaflops: float, values: Mapping[str, float]) -> None:
        """Write the values, with the compute as one more."""
        self._run.log({**values, "petaflops": petaflops}, step=step)

    def images(self, step: int, grid: Image.Image) -> None:
        """Write a grid of samples."""
        self._run.log({"samples": self._trackio.Image(grid, caption=f"step {step}")}, step=step)

    def close(self) -> None:
        """End the run, as the program's current one: else it would be ended, and reported, once more at exit."""
        if self._run is not None:
            with redirect_stdout(sys.stderr):
                self._trackio.finish()
