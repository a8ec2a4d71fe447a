"""Callbacks of training: sample grids and TensorBoard."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..reporting.pictures import grid, save_png
from ..samplers.class_labels import labels_in_turn
from ..samplers.sampling import sample_images
from .callbacks import Callback
from .trainer import Trainer


class SampleGrid(Callback[Trainer]):
    """Samples from the averaged weights and fixed noise every training.sample_every steps: RUN/samples/step_N.png.

    Args:
        shape: (C, H, W) of the network's output.
        decode: maps latents to images. None: the network's output is an image.
    """

    everywhere = True  # each process samples its share of the images

    def __init__(self, shape: tuple[int, ...], decode: Callable[[Tensor], Tensor] | None = None) -> None:
        self.shape, self.decode = shape, decode

    def stepped(self, trainer: Trainer) -> None:
        """Draw a grid every training.sample_every steps."""
        config, training = trainer.config, trainer.config.training
        if not training.sample_every or trainer.step % training.sample_every:
            return
        try:
            images = sample_images(
                trainer.averaged(),
                self.shape,
                training.sample_count,
                config=config.sampling,
                schedule=config.diffusion.schedule,
                seed=training.seed,
                labels=labels_in_turn(config, training.sample_count),
                device=trainer.device,
                decode=self.decode,
                autocast=trainer.passes.autocast,
                world=trainer.world,
            )
        except FloatingPointError as error:  # an early network may diverge in sampling; training continues
            warnings.warn(f"no sample grid at step {trainer.step}: {error}", stacklevel=2)
            return
        if trainer.world.is_main_process:
            save_png(grid(images), trainer.run.path / "samples" / f"step_{trainer.step:08d}.png")


class TensorBoard(Callback[Trainer]):
    """Writes every logged number to RUN/tensorboard (extra `track`).

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

    def started(self, trainer: Trainer) -> None:
        """Open the event file; records after the resumed step are hidden (purge_step)."""
        self._writer = self._make(str(trainer.run.path / "tensorboard"), purge_step=trainer.step + 1)

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Write the numbers of a record."""
        if record["kind"] == "quality":
            self._write_quality(trainer, record)
            return
        for stage, loss in enumerate(record["loss"], start=1):
            if loss is not None:
                self._writer.add_scalar(f"loss/{record['kind']}/stage {stage}", loss, record["step"])
        for name, norm in record.get("grad_norm", {}).items():
            self._writer.add_scalar(f"gradient norm/{name}", norm, record["step"])
        for name in ("lr", "images_per_s"):
            if name in record:
                self._writer.add_scalar(name, record[name], record["step"])

    def _write_quality(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if record["frechet"] is None:
            return
        self._writer.add_scalar("quality/frechet", record["frechet"], record["step"])
        teraflops = round(1000 * record["petaflops"])
        if self._by_flops is None:
            # a separate folder: its purge_step counts tera-FLOPs, not training steps
            folder = trainer.run.path / "tensorboard" / "by-flops"
            self._by_flops = self._make(str(folder), purge_step=teraflops)
        self._by_flops.add_scalar("quality/frechet against tera-FLOPs", record["frechet"], teraflops)

    def finished(self, trainer: Trainer) -> None:
        """Close the event files."""
        self._writer.close()
        if self._by_flops is not None:
            self._by_flops.close()
