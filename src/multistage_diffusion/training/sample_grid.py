"""The callback that draws grids of samples during training."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from PIL import Image
from torch import Tensor

from ..reporting.pictures import grid, save_png
from ..samplers.class_labels import labels_in_turn, names_of
from ..samplers.sampling import sample_images
from .callbacks import Callback, StopRequested, between_steps
from .trainer import Trainer


class SampleGrid(Callback[Trainer]):
    """Samples from the averaged weights and fixed noise every training.sample_every steps: RUN/samples/step_N.png.

    Each sample of a class-conditional run has its class as a caption.

    Args:
        shape: (C, H, W) of the network's output.
        decode: maps latents to images. None: the network's output is an image.
        show: called with (step, grid) of each grid on the main process.
    """

    everywhere = True  # each process samples its share of the images

    def __init__(
        self,
        shape: tuple[int, ...],
        decode: Callable[[Tensor], Tensor] | None = None,
        show: Callable[[int, Image.Image], object] | None = None,
    ) -> None:
        self.shape, self.decode, self.show = shape, decode, show

    def stepped(self, trainer: Trainer) -> None:
        """Draw a grid every training.sample_every steps."""
        config, training = trainer.config, trainer.config.training
        if not training.sample_every or trainer.step % training.sample_every or trainer.stopped:
            return
        labels = labels_in_turn(config, training.sample_count)
        try:
            images = sample_images(
                trainer.averaged(),
                self.shape,
                training.sample_count,
                config=config.sampling,
                schedule=config.diffusion.schedule,
                seed=training.seed,
                labels=labels,
                device=trainer.device,
                decode=self.decode,
                autocast=trainer.passes.autocast,
                world=trainer.world,
                progress=between_steps(trainer, "drawing samples"),
            )
        except StopRequested:
            return
        except FloatingPointError as error:  # an early network may diverge in sampling; training continues
            warnings.warn(f"no sample grid at step {trainer.step}: {error}", stacklevel=2)
            return
        if trainer.world.is_main_process:
            picture = grid(images, captions=names_of(config, labels))
            save_png(picture, trainer.run.path / "samples" / f"step_{trainer.step:08d}.png")
            if self.show is not None:
                self.show(trainer.step, picture)
