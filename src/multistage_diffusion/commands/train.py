"""msdiff train: train or resume a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..config.presets import preset
from ..config.serialization import override
from ..console import Bar, TrainingProgress, console
from ..distributed import is_main_process
from ..errors import UserError
from ..performance.profiling import Profile, require_profile_place
from ..stage_finding import StageResult
from ..training.callbacks import Callback
from ..training.run import Run
from ..training.strategies import Strategy
from ..training.trainer import Trainer
from ..workflow.train import resume, train
from .options import Changes, DataOptions, Device, load_config, option, parse_changes, say


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
      msdiff train --preset digits --out runs/evaluated --set evaluation.every=500 evaluation.patience=5
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
    track: Annotated[tuple[str, ...], option("TRACKER ...")] = ()
    """Programs that receive metrics, samples and the configuration: tensorboard (extra: track)."""
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
        if self.profile and self.resume is not None:
            require_profile_place(self.resume)
        with TrainingProgress() as progress, Bar("encoding", "images") as bar:
            callbacks: list[Callback[Trainer]] = [progress]
            if self.profile:
                callbacks.append(Profile(console.print))
            trained = self.go_on if self.resume is not None else self.start
            run = trained(changes, callbacks, bar)
        if not is_main_process():
            return
        say(
            f"trained: {run.path} (next: msdiff sample {run.path}, msdiff evaluate {run.path}, msdiff report {run.path})"
        )

    def go_on(self, changes: dict[str, Any], callbacks: Sequence[Callback[Trainer]], bar: Bar) -> Run:
        """Resume a run."""
        for name in ("preset", "config", "stages", "init_from", "out", "replace"):
            if getattr(self, name):
                raise UserError(
                    f"--{name.replace('_', '-')} does not go with --resume: a run keeps its own; start a new run instead"
                )
        assert self.resume is not None
        return resume(
            self.resume,
            changes,
            device=self.device,
            strategy=self.strategy,
            callbacks=callbacks,
            trackers=self.track,
            progress=bar,
        )

    def start(self, changes: dict[str, Any], callbacks: Sequence[Callback[Trainer]], bar: Bar) -> Run:
        """Start a run."""
        if (self.preset is None) == (self.config is None):
            raise UserError("give one of --preset NAME, --config FILE or --resume RUN")
        if self.out is None:
            raise UserError("--out is missing: name the new run's folder (or --resume RUN)")
        base = load_config(self.config) if self.config is not None else preset(self.preset or "")
        if self.stages is not None and any(key.startswith("stages.") for key in changes):
            raise UserError("--stages FILE and --set stages.... both name the stages; give one of them")
        result = None if self.stages is None else StageResult.load(self.stages)
        if result is not None:  # override stages and decoder widths together: their numbers must match
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
            trackers=self.track,
            progress=bar,
        )
