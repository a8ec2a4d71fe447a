"""msdiff export: write a run's weights in a published layout."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..training.run import Run
from ..workflow.export import export_published, original_settings
from .options import RunFolder, check_out, print_json, say


@dataclass(kw_only=True)
class Export:
    """Write a run's weights in the published layout of its family.

    NCSN++ is written as score_sde's .pth, the LDM U-Net as latent diffusion's .ckpt, and DDPM++ as .safetensors with EDM's
    names, because EDM's pickles contain source code, which is neither executed nor written here.

    Examples
      msdiff export runs/digits --out digits.safetensors
      msdiff export runs/cifar --out cifar.pth --checkpoint latest
    """

    run_folder: RunFolder
    """A trained run's folder."""
    out: Path
    """FILE.pth (NCSN++), FILE.ckpt (LDM U-Net), FILE.safetensors (DDPM++); one-stage transformers: see docs/transformers.md."""
    checkpoint: str = "best"
    """best, latest or a step."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the file, run and checkpoint as JSON."""

    def run(self) -> None:
        """Run the command."""
        check_out(self.out, self.overwrite)
        file = export_published(self.run_folder, self.out, checkpoint=self.checkpoint, overwrite=self.overwrite)
        config = Run.open(self.run_folder).config()
        if self.json:
            made = {"out": str(file), "run": str(self.run_folder), "checkpoint": self.checkpoint}
            print_json({**made, "original_settings": original_settings(config)})
        else:
            say(f"written: {file}")
            for name, value in original_settings(config).items():
                say(f"in the original code's configuration: {name} = {value}")
