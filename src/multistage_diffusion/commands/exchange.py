"""Commands that exchange networks with other code: import of published checkpoints, export of runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config.presets import preset
from ..stage_finding import StageResult
from ..workflow.exchange import export_published, import_published
from .options import RunFolder, check_out, option, print_json, say


@dataclass(kw_only=True)
class Import:
    """Make a run of a published checkpoint: score_sde's .pth, EDM's .pkl, latent diffusion's .ckpt.

    Nothing in the file is run. The network is read off names and shapes; stages, training and sampling are those of the
    paper's preset with as many decoders unless said otherwise. The run has no data: go on with msdiff train --resume RUN
    --data DATA.

    Examples
      msdiff import checkpoint_26.pth --out runs/published
      msdiff import model.ckpt --out runs/ldm --size 32 32 --head-channels 64
      msdiff import digits.safetensors --preset digits --out runs/again
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The checkpoint (or what msdiff export wrote)."""
    out: Path
    """The run's new folder."""
    preset: Annotated[str | None, option("NAME", "the paper's of as many decoders")] = None
    """Whose training, sampling and stages the run gets."""
    size: Annotated[tuple[int, int] | None, option("H W", "the preset's")] = None
    """Height and width of what the network sees: images, or latents of LDM."""
    stages: Annotated[Path | None, option("FILE", "the preset's")] = None
    """A stages.json with the noise ranges that the decoders were trained on."""
    head_channels: Annotated[int | None, option("INT", "32")] = None
    """Channels of an attention head (LDM)."""
    replace: bool = False
    """Move a run that is already at OUT aside."""
    json: bool = False
    """Print what was read as JSON."""

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


@dataclass(kw_only=True)
class Export:
    """Write a run's weights in the published layout of its family.

    NCSN++ makes a .pth as score_sde writes, the LDM U-Net a .ckpt as latent diffusion does, DDPM++ a .safetensors with
    EDM's names: EDM's pickles carry source code, which is neither run nor written here.

    Examples
      msdiff export runs/digits --out digits.safetensors
      msdiff export runs/cifar --out cifar.pth --checkpoint latest
    """

    run_folder: RunFolder
    """A trained run's folder."""
    out: Path
    """FILE.pth, FILE.ckpt or FILE.safetensors, as the family asks."""
    checkpoint: str = "best"
    """best, latest or a step."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print what was done as JSON."""

    def run(self) -> None:
        """Run the command."""
        check_out(self.out, self.overwrite)
        file = export_published(self.run_folder, self.out, checkpoint=self.checkpoint, overwrite=self.overwrite)
        if self.json:
            print_json({"out": str(file), "run": str(self.run_folder), "checkpoint": self.checkpoint})
        else:
            say(f"written: {file}")
