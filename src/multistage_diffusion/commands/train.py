"""Commands that make runs and samples."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from ..config.presets import preset
from ..config.serialization import override, to_dict
from ..console import Bar, TrainingProgress, console
from ..distributed import is_main_process
from ..errors import UserError
from ..performance.profiling import Profile
from ..reporting.pictures import MOST_IN_GRID, folder_of_images, grid, save_npz, save_png
from ..samplers import make_plan, shortcoming
from ..samplers.class_labels import warn_of_empty
from ..stage_finding import StageResult
from ..training.callbacks import Callback
from ..training.run import Run
from ..training.sample_grid import TensorBoard
from ..training.strategies import Strategy
from ..workflow.sample import sample, sample_labels
from ..workflow.train import resume, train
from .options import (
    Changes,
    DataOptions,
    Device,
    RunFolder,
    SamplerOptions,
    check_out,
    load_config,
    option,
    parse_changes,
    print_json,
    say,
)


@dataclass(kw_only=True)
class Train(DataOptions):
    """Train a multi-decoder model, or go on with a run.

    Settings come from a preset or a configuration file; --set changes single ones (YAML values).

    Examples
      msdiff train --preset digits --data digits --stages stages.json --out runs/digits
      msdiff train --preset fashion-mnist --data photos/ --size 32 48 --fit crop --out runs/photos
      msdiff train --preset digits --out runs/slow --set optimizer.lr=1e-4 training.steps=20000
      msdiff train --preset fashion-mnist-latent --codec codecs/fashion --out runs/latent
      msdiff train --preset cifar10-edm --data cifar10:data/ --init-from runs/one-stage --out runs/three-stages
      msdiff train --preset digits --out runs/judged --set evaluation.every=500 evaluation.patience=5
      msdiff train --preset fashion-mnist --out runs/timed --profile
      msdiff train --resume runs/digits
      msdiff train --resume runs/digits --set training.steps=20000
      torchrun --nproc-per-node 4 -m multistage_diffusion train --preset digits --out runs/four --strategy memory
    """

    preset: Annotated[str | None, option("NAME")] = None
    """Where to start from; msdiff presets lists them, msdiff describe NAME shows one."""
    config: Annotated[Path | None, option("FILE")] = None
    """A configuration (JSON or YAML, e.g. another run's config.json) instead of a preset."""
    data: Annotated[str | None, option("DATA", "the preset's")] = None
    """digits, fashion-mnist[:FOLDER], cifar10:FOLDER, hf:NAME[:SPLIT], a folder or .zip of images, .npy or .npz"""
    stages: Annotated[Path | None, option("FILE", "the preset's")] = None
    """The stages.json of msdiff stages."""
    codec: Annotated[str | None, option("CODEC", "the preset's; most train on pixels")] = None
    """Train on the latents of this autoencoder: a folder (msdiff train-codec) or hf:NAME."""
    init_from: Annotated[Path | None, option("RUN")] = None
    """Start from a trained run: its encoder, and its decoder in every stage that is as wide."""
    out: Annotated[Path | None, option("FOLDER")] = None
    """The run's new folder."""
    resume: Annotated[Path | None, option("RUN")] = None
    """A run to go on with, from its latest checkpoint."""
    set: Changes = ()
    """Changes to the preset, e.g. optimizer.lr=1e-4 network.decoder_widths=[64,48,16]."""
    replace: bool = False
    """Move a run that is already at OUT aside."""
    strategy: Strategy = "time"
    """Started by torchrun, what each process holds: the whole network, or (memory) the decoders of its own stages."""
    profile: bool = False
    """Time the parts of some steps, print them, write a trace to RUN/profile, and train on."""
    tensorboard: bool = False
    """Write TensorBoard events to the run (extra: track)."""
    device: Device = None
    """cpu, cuda or cuda:N"""

    def run(self) -> None:
        """Run the command."""
        changes = {f"data.{name}": value for name, value in self.given().items()} | parse_changes(self.set)
        if self.data is not None:
            changes["data.source"] = self.data
        if self.codec is not None:
            changes["codec.source"] = self.codec
        if self.init_from is not None:
            changes["training.init_from"] = str(self.init_from)
        with TrainingProgress() as progress, Bar("encoding", "images") as bar:
            callbacks: list[Callback] = [progress]
            if self.profile:
                callbacks.append(Profile(console.print))
            if self.tensorboard:
                callbacks.append(TensorBoard())
            trained = self.go_on if self.resume is not None else self.start
            run = trained(changes, callbacks, bar)
        if not is_main_process():
            return
        say(
            f"trained: {run.path} (next: msdiff sample {run.path}, msdiff evaluate {run.path}, msdiff report {run.path})"
        )

    def go_on(self, changes: dict[str, Any], callbacks: Sequence[Callback], bar: Bar) -> Run:
        """Resume a run."""
        for name in ("preset", "config", "stages", "init_from", "out", "replace"):
            if getattr(self, name):
                raise UserError(
                    f"--{name.replace('_', '-')} does not go with --resume: a run keeps its own; start a new run instead"
                )
        assert self.resume is not None
        return resume(
            self.resume, changes, device=self.device, strategy=self.strategy, callbacks=callbacks, progress=bar
        )

    def start(self, changes: dict[str, Any], callbacks: Sequence[Callback], bar: Bar) -> Run:
        """Start a run."""
        if (self.preset is None) == (self.config is None):
            raise UserError("give one of --preset NAME, --config FILE or --resume RUN")
        if self.out is None:
            raise UserError("--out is missing: name the new run's folder (or --resume RUN)")
        base = load_config(self.config) if self.config is not None else preset(self.preset or "")
        if self.stages is not None and any(key.startswith("stages.") for key in changes):
            raise UserError("--stages FILE and --set stages.... both name the stages; give one of them")
        result = None if self.stages is None else StageResult.load(self.stages)
        if result is not None:  # together with decoder widths for as many stages
            changes = {"stages": result.stages(), **changes}
        config = override(base, changes)
        return train(
            config,
            self.out,
            result=result,
            replace=self.replace,
            device=self.device,
            strategy=self.strategy,
            callbacks=callbacks,
            progress=bar,
        )


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
        written = folder_of_images(self.out, labels) if folder and is_main_process() else nullcontext()
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
            say(f"written: {self.out} ({self.count} samples, {sampling.solver}, {sampling.calls} calls)")
