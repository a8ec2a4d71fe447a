"""msdiff import: create a run from a published checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config.presets import preset
from ..stage_finding import StageResult
from ..workflow.import_run import import_published
from .options import option, print_json, say


@dataclass(kw_only=True)
class Import:
    """Create a run from a published checkpoint (score_sde, EDM, latent diffusion) or a folder of diffusers.

    Files are score_sde's .pth, EDM's .pkl, latent diffusion's .ckpt, and what msdiff export writes.
    No code in the file is executed. The network is derived from tensor names and shapes. Stages, training and sampling
    are those of a preset, by default of the paper's preset with as many decoders. The run has no data; to train it, give
    some: msdiff train --resume RUN --data DATA.

    Of a folder that diffusers wrote (a pipeline, or a checkpoint of train_unconditional.py), a UNet2DModel becomes a run
    with one stage, with the noise of its scheduler. msdiff train DATA --init-from RUN then gives it a decoder per stage.

    Examples
      msdiff import checkpoint_26.pth --out runs/published
      msdiff import model.ckpt --out runs/ldm --size 32 32 --head-channels 64
      msdiff import digits.safetensors --preset digits --out runs/again
      msdiff import ddpm-cifar10-32/ --out runs/one
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The checkpoint, a file that msdiff export wrote, or a folder of diffusers."""
    out: Path
    """The run's new folder."""
    preset: Annotated[str | None, option("NAME", "the paper's preset with as many decoders")] = None
    """The preset whose training, sampling and stages the run gets."""
    size: Annotated[tuple[int, int] | None, option("H W", "the preset's")] = None
    """Height and width of the network's input: images, or latents for LDM."""
    stages: Annotated[Path | None, option("FILE", "the preset's")] = None
    """A stages.json with the noise ranges that the decoders were trained on."""
    head_channels: Annotated[int | None, option("INT", "32")] = None
    """Channels of an attention head (LDM only)."""
    replace: bool = False
    """Move an existing run at OUT aside."""
    json: bool = False
    """Print the network and its stages as JSON."""

    def run(self) -> None:
        """Run the command."""
        run = import_published(
            self.file,
            self.out,
            base=None if self.preset is None else preset(self.preset),
            size=self.size,
            result=None if self.stages is None else StageResult.load(self.stages),
            head_channels=self.head_channels,
            replace=self.replace,
        )
        config = run.config()
        if self.json:
            print_json(
                {
                    "run": str(run.path),
                    "family": config.network.family,
                    "encoder_width": config.network.encoder_width,
                    "decoder_widths": list(config.network.decoder_widths),
                    "edges_sigma": list(config.stages.interior),
                }
            )
            return
        widths = ", ".join(map(str, config.network.decoder_widths))
        say(
            f"imported: {run.path} ({config.network.family}, encoder {config.network.encoder_width}, decoders {widths})"
        )
        for k, sigma in enumerate(config.stages.interior, start=1):
            say(f"stage {k} | {k + 1}: sigma = {sigma:.4f}")
