"""msdiff import: create a run from a published checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config.presets import preset
from ..stage_finding import StageResult
from ..workflow.import_run import import_published
from ..workflow.imported import read_own_sampler
from .options import option, print_json, say


@dataclass(kw_only=True)
class Import:
    """Create a run from a published checkpoint (score_sde, EDM, latent diffusion) or a folder of diffusers.

    No code in the file is executed. The network is derived from tensor names and shapes. Training is that of a preset, by
    default of the paper's preset with as many decoders; so are stages and sampling, unless the file tells them. A warning
    names what is assumed and would change the images. The run has no data; to train it, give
    some: msdiff train --resume RUN --data DATA.

    Of a folder that diffusers wrote (a pipeline, or a checkpoint of train_unconditional.py), a UNet2DModel becomes a run
    with one stage, with the noise of its scheduler. msdiff train DATA --init-from RUN then gives it a decoder per stage.

    Examples
      msdiff import checkpoint_26.pth --out runs/published
      msdiff import model.ckpt --out runs/ldm --size 32 32 --head-channels 64
      msdiff import network-snapshot-002500.pkl --out runs/two --edges 1.5
      msdiff import digits.safetensors --preset digits --out runs/again
      msdiff import transformer.pt --encoder-depth 20 --out runs/trunk
      msdiff import ddpm-cifar10-32/ --out runs/one
    """

    file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """The checkpoint, a file that msdiff export wrote, or a folder of diffusers: a UNet2DModel or a transformer."""
    out: Path
    """The run's new folder."""
    preset: Annotated[str | None, option("NAME", "the paper's preset with as many decoders")] = None
    """The preset whose training, sampling and stages the run gets."""
    size: Annotated[tuple[int, int] | None, option("H W", "the preset's")] = None
    """Height and width of the network's input: images, or latents for LDM."""
    stages: Annotated[Path | None, option("FILE", "the file's, else the preset's")] = None
    """A stages.json with the noise ranges that the decoders were trained on."""
    edges: Annotated[tuple[float, ...] | None, option("SIGMA ...", "the file's, else the preset's")] = None
    """The edges between these noise ranges, in sigma: one fewer than decoders."""
    norm_groups: Annotated[int | None, option("INT", "the file's, else 32, of the multi-stage code 16")] = None
    """Largest number of groups of a GroupNorm (NCSN++ and DDPM++)."""
    head_channels: Annotated[int | None, option("INT", "32; of a transformer as published")] = None
    """Channels of an attention head (LDM and transformers; a folder of diffusers tells them)."""
    encoder_depth: Annotated[int | None, option("INT", "half")] = None
    """Blocks of a transformer that become the encoder, which all stages can share; the others become the decoder."""
    classes: Annotated[int | None, option("INT", "rows of the class table less one")] = None
    """Classes of a transformer whose class table does not tell whether its last row stands for no label."""
    drop_sigma: bool = False
    """Leave out a transformer's outputs for a learnt variance."""
    noise: Annotated[Literal["ddpm", "sit"] | None, option("{ddpm,sit}", "the file's, else ddpm")] = None
    """On which noise a transformer (.pt) was trained: ddpm predicts that of DDPM's steps, sit the velocity on SiT's path."""
    sampler: Literal["ddim", "own"] = "ddim"
    """Of the run of a UNet2DModel: DDIM in 50 calls, or that of the pipeline, such as DDPM's in 1000 calls."""
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
            edges=self.edges,
            head_channels=self.head_channels,
            norm_groups=self.norm_groups,
            encoder_depth=self.encoder_depth,
            classes=self.classes,
            drop_sigma=self.drop_sigma,
            noise=self.noise,
            sampler=self.sampler,
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
        say(f"sampler: {config.sampling.solver}, {config.sampling.calls} calls")
        if (own := read_own_sampler(run)) is not None:
            say(own.sentence(run.path, config.sampling))
