"""msdiff sample: draw samples of a run."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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
from ..samplers.class_labels import names_of, warn_of_empty
from ..training.run import Run
from ..workflow.imported import read_own_sampler
from ..workflow.sample import sample, sample_labels
from .options import Average, Device, RunFolder, SamplerOptions, check_out, option, print_json, say


@dataclass(kw_only=True)
class Sample(SamplerOptions):
    """Draw samples of a run: a grid (.png), a folder of images, or an array (.npz).

    Sample i depends on the seed and i alone, not on the count or the batch.

    Examples
      msdiff sample runs/digits --count 64 --seed 0 --solver dpm --calls 20 --out grid.png
      msdiff sample runs/digits --count 5000 --out samples.npz
      msdiff sample runs/digits --count 100 --out samples/ --format webp
      msdiff sample runs/pets --label cats --out cats.png
    """

    run_folder: RunFolder
    """A trained run's folder."""
    count: int = 64
    """Number of samples."""
    seed: int = 0
    """Seed."""
    out: Path = Path("samples.png")
    """FILE.png for a grid, FILE.npz for an array, a name without a suffix for a folder of images (--format)."""
    label: Annotated[str | None, option("CLASS", "all: in turn in a grid, else as frequent as in training")] = None
    """Name or number of the class of all samples (class-conditional runs)."""
    captions: Literal["auto", "on", "off"] = "auto"
    """Write the class below each sample of a grid; auto: if the samples are of several classes."""
    format: Annotated[Literal["png", "jpg", "webp"] | None, option("{png,jpg,webp}", "png")] = None
    """Of the images in a folder: png and webp (both without loss) or jpg (quality 95)."""
    checkpoint: str = "best"
    """best, latest or a step."""
    ema: Average = None
    """Width of another average of the weights, computed from the snapshots of a run with training.ema_profiles."""
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
            raise UserError(
                f"--out {self.out}: samples are written as a .png grid, an .npz array or a folder of images (--format)"
            )
        if self.format is not None and not folder:
            raise UserError(
                f"--format {self.format}: images in a folder have a format; give --out FOLDER, not {self.out}"
            )
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
            warn_of_empty(config.data.class_counts, config.data.class_names)
        names = names_of(config, labels)
        captions = self._captions(names, grid=in_turn)
        written: AbstractContextManager[Any] = nullcontext()
        if folder and is_main_process():
            kind = self.format or "png"
            written = folder_of_images(self.out, labels, names, kind=kind, replace=self.overwrite)
        with Bar("sampling", "samples") as bar, written as write:
            images = sample(
                run,
                self.count,
                seed=self.seed,
                sampling=sampling,
                checkpoint=self.checkpoint,
                ema=self.ema,
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
            save_png(grid(images, captions=captions), self.out)
        elif suffix == ".npz":
            save_npz(images, self.out, labels)
        of = f" of class {names[0]}" if names is not None and self.label is not None else ""
        if self.json:
            print_json({"out": str(self.out), "count": self.count, "seed": self.seed, "sampling": to_dict(sampling)})
        else:
            made = f"{counted(self.count, 'sample')}{of}, {sampling.solver}, {counted(sampling.calls, 'call')}"
            say(f"written: {self.out} ({made})")
            if (own := read_own_sampler(run)) is not None:
                say(own.sentence(run.path, config.sampling, sampling))

    def _captions(self, names: Sequence[str] | None, *, grid: bool) -> Sequence[str] | None:
        """Return the captions of a grid; None for none."""
        if self.captions == "on" and (names is None or not grid):
            why = "the run is unconditional" if names is None else "only a .png grid has captions"
            raise UserError(f"--captions on: {why}; leave it out")
        wanted = self.captions == "on" or (self.captions == "auto" and len(set(names or ())) > 1)
        return names if wanted and grid else None
