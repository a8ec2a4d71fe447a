"""Weights & Biases (extra `wandb`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from .registry import TRACKERS, Tracker, not_installed, recall, remember

PROJECT = "multistage-diffusion"  # unless WANDB_PROJECT names another


@TRACKERS.add("wandb")
class WandB(Tracker):
    """Sends everything to Weights & Biases; a run that is resumed goes on there, too.

    With WANDB_MODE=offline everything is written to RUN/wandb, from where `wandb sync` sends it later. The x axis of all
    curves is the step; those below "by compute" are drawn against training PFLOPs.

    Raises:
        UserError: if wandb is not installed.
    """

    def __init__(self) -> None:
        try:
            import wandb
        except ImportError:
            raise not_installed("wandb") from None
        self._wandb: Any = wandb
        self._run: Any = None

    def open(self, folder: Path, step: int) -> None:
        """Start the run, or go on with the one that this folder has started.

        Raises:
            UserError: if Weights & Biases cannot be reached or does not know the user.
        """
        known = recall(folder, "wandb")
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=folder.name,
                id=known.get("id"),
                resume="allow" if known else None,
                dir=str(folder),
                settings=self._wandb.Settings(console="off"),
            )
        except self._wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"track=wandb: {reason}; log in (wandb login), set WANDB_MODE=offline, or go on with --track none"
            ) from None
        remember(folder, "wandb", {"id": self._run.id})
        for axis, names in (("step", "*"), ("petaflops", "by compute/*")):
            self._run.define_metric(axis)
            self._run.define_metric(names, step_metric=axis)

    def config(self, config: dict[str, Any]) -> None:
        """Send the configuration as hyper-parameters."""
        self._run.config.update(config, allow_val_change=True)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        self._run.log({"step": step, **values})

    def evaluation(self, step: int, petaflops: float, values: Mapping[str, float]) -> None:
        """Send the values by step and by compute."""
        by_compute = {f"by compute/{name}": value for name, value in values.items()}
        self._run.log({"step": step, "petaflops": petaflops, **values, **by_compute})

    def images(self, step: int, grid: Image.Image) -> None:
        """Send a grid of samples."""
        self._run.log({"step": step, "samples": self._wandb.Image(grid)})

    def close(self) -> None:
        """End the run."""
        if self._run is not None:
            self._run.finish()
