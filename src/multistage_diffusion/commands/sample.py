"""msdiff sample: draw samples of a run."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..config.serialization import to_dict
from ..console import Bar
from ..distributed import is_main_process
from ..errors import UserError
from ..escaping import counted
from ..reporting.pictures import MOST_IN_GRID, folder_of_images, grid, save_npz, save_png
from ..samplers import make_plan, shortcoming
from ..samplers.class_labels import warn_of_empty
from ..training.run import Run
from ..workflow.sample import sample, sample_labels
from .options import Device, RunFolder, SamplerOptions, check_out, option, print_json, say


@dataclass(kw_only=True)
class Sample(SamplerOptions):
    """Draw samples of a run: a grid (.png), a folder of PNGs, or an array (.npz).

    Sample i depends on the seed and i alone, not on the count or the batch.

    Examples
      msdiff sample runs/digits --count 64 --seed 0 --solver dpm --calls 20 --out grid.png
      msdiff sample runs/digits --count 5000 --out samples.npz
      msdiff sample runs/digits --count 100 --out samples/
    """

    run_folder: RunFolder
    """A trained run's folder."""
    count: int = 64
    """Number of samples."""
    seed: int = 0
    """Seed."""
    out: Path = Path("samples.png")
    """FILE.png for a grid, FILE.npz for an array, anything else for a folder."""
    label: Annotated[int | None, option("INT", "all: in turn in a grid, else as frequent as in training")] = None
    """Class of all samples (class-conditional runs)."""
    checkpoint: str = "best"
    """best, latest or a step."""
    batch: Annotated[int | None, option("INT", "as many as fit into memory")] = None
    """Samples drawn at once."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the network: auto is bf16 on CUDA, fp32 on the CPU."""
    compile: bool = False
    """Compile the network first: minutes, for thousands of samples."""
    offload: bool = False
    """Keep one stage's decoder at a time on the device."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print what was done as JSON."""

    def run(self) -> None:
        """Run the command."""
        run = Run.open(self.run_folder)
        suffix = self.out.suffix.lower()
        folder = suffix not in (".png", ".npz")
        if suffix in (".jpg", ".jpeg", ".webp", ".gif", ".npy", ".zip"):
            raise UserError(f"--out {self.out}: samples are written as a .png grid, an .npz array or a folder of PNGs")
        check_out(self.out, self.overwrite, folder=folder)
        if suffix == ".png" and self.count > MOST_IN_GRID:
            raise UserError(
                f"--count {self.count}: a grid holds at most {MOST_IN_GRID} samples; write them to an .npz file or a folder"
            )
        config = run.config()
        sampling = self.sampling_config(config.sampling)
        if is_main_process() and (reason := shortcoming(make_plan(sampling, config.diffusion.schedule))):
            warnings.warn(f"{reason} (docs/sampling.md)", stacklevel=2)
        in_turn = suffix == ".png"
        labels = sample_labels(config, self.count, seed=self.seed, label=self.label, in_turn=in_turn)
        if self.label is None:
            warn_of_empty(config.data.class_counts)
        written: AbstractContextManager[Any] = nullcontext()
        if folder and is_main_process():
            written = folder_of_images(self.out, labels, replace=self.overwrite)
        with Bar("sampling", "calls") as bar, written as write:
            images = sample(
                run,
                self.count,
                seed=self.seed,
                sampling=sampling,
                checkpoint=self.checkpoint,
                label=self.label,
                in_turn=in_turn,
                batch=self.batch,
                device=self.device,
                precision=self.precision,
                compile=self.compile,
                offload=self.offload,
                finished=write,
                progress=bar,
            )
        if not is_main_process():
            return
        if suffix == ".png":
            save_png(grid(images), self.out)
        elif suffix == ".npz":
            save_npz(images, self.out, labels)
        if self.json:
            print_json({"out": str(self.out), "count": self.count, "seed": self.seed, "sampling": to_dict(sampling)})
        else:
            say(
                f"written: {self.out} ({counted(self.count, 'sample')}, {sampling.solver}, {counted(sampling.calls, 'call')})"
            )
