"""msdiff export: write a run for other code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ..training.run import Run
from ..workflow.export import export_published, original_settings
from ..workflow.export_diffusers import export_diffusers
from ..workflow.export_unet2d import export_unet2d
from .options import RunFolder, check_out, option, print_json, say

EXPORTS: dict[str, Callable[..., Path]] = {
    "published": export_published,
    "diffusers": export_diffusers,
    "unet2d": export_unet2d,
}


@dataclass(kw_only=True)
class Export:
    """Write a run for other code: a pipeline of diffusers, or the published layout of its family.

    The default is the layout of the family's own code: NCSN++ is written as score_sde's .pth, the LDM U-Net as latent
    diffusion's .ckpt, and DDPM++ as .safetensors with EDM's names, because EDM's pickles contain source code, which is
    neither executed nor written here. With --format diffusers, any run becomes a pipeline with its own code, for
    DiffusionPipeline.from_pretrained(OUT, trust_remote_code=True). With --format unet2d, a one-stage run, such as one that
    was imported from diffusers, becomes a DDIMPipeline with a UNet2DModel.

    Examples
      msdiff export runs/digits --out digits.safetensors
      msdiff export runs/cifar --out cifar.pth --checkpoint latest
      msdiff export runs/digits --format diffusers --out digits-pipeline/
      msdiff export runs/imported --format unet2d --out pipeline/
    """

    run_folder: RunFolder
    """A trained run's folder."""
    out: Path
    """FILE.pth (NCSN++), FILE.ckpt (LDM U-Net) or FILE.safetensors (DDPM++), of one-stage transformers see
    docs/transformers.md; a folder for the other formats."""
    format: Annotated[Literal["published", "diffusers", "unet2d"], option("FORMAT", "published")] = "published"
    """published: the layout of the family's own code; diffusers: a pipeline with its code; unet2d: diffusers' UNet2DModel."""
    checkpoint: str = "best"
    """best, latest or a step."""
    overwrite: bool = False
    """Replace OUT if it exists; of folders, only pipelines."""
    json: bool = False
    """Print the file, run and checkpoint as JSON."""

    def run(self) -> None:
        """Run the command."""
        check_out(self.out, self.overwrite, folder=self.format != "published")
        file = EXPORTS[self.format](self.run_folder, self.out, checkpoint=self.checkpoint, overwrite=self.overwrite)
        settings = original_settings(Run.open(self.run_folder).config()) if self.format == "published" else {}
        if self.json:
            made = {"out": str(file), "run": str(self.run_folder), "checkpoint": self.checkpoint}
            print_json({**made, "original_settings": settings})
        else:
            say(f"written: {file}")
            for name, value in settings.items():
                say(f"in the original code's configuration: {name} = {value}")
