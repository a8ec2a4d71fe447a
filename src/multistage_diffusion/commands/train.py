"""msdiff train: train or resume a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
import yaml
from tyro.conf import Positional

from ..config import CodecConfig, RunConfig
from ..config.presets import preset
from ..config.serialization import override, to_dict
from ..console import Bar, TrainingProgress, console
from ..distributed import in_many, is_main_process
from ..errors import UserError
from ..stage_finding import StageResult
from ..training.callbacks import Callback
from ..training.profiling import Profile, require_profile_place
from ..training.run import Run
from ..training.strategies import STRATEGIES
from ..training.trainer import Trainer
from ..workflow.auto import auto_config
from ..workflow.auto_from import config_from_run
from ..workflow.resume import resume
from ..workflow.train import train
from .options import Changes, DataOptions, Device, data_option, dotted_changes, load_config, one_of, option, say

AUTO = "auto"


class Chosen(NamedTuple):
    """The settings of a new run: a configuration, changes to it, and the stages."""

    config: RunConfig
    changes: dict[str, Any]
    result: StageResult | None


@dataclass(kw_only=True)
class Train(DataOptions):
    """Train a multi-decoder model, or resume a run.

    Without a preset or a configuration file, all settings are chosen for the images and this device, and printed with
    the reasons. --set changes settings (YAML values).

    Examples
      msdiff train photos/ --out runs/photos
      msdiff train photos/ --size 64 64 --print-config
      msdiff train --preset digits --data digits --stages stages.json --out runs/digits
      msdiff train --preset fashion-mnist --data photos/ --size 32 48 --fit crop --out runs/photos
      msdiff train --preset digits --out runs/slow --set optimizer.lr=1e-4 training.steps=20000
      msdiff train --preset fashion-mnist-latent --codec codecs/fashion --out runs/latent
      msdiff train photos/ --init-from runs/imported --out runs/three-decoders
      msdiff train --preset cifar10-edm --data cifar10:data/ --init-from runs/one-stage --out runs/three-stages
      msdiff train --preset digits --out runs/evaluated --set evaluation.every=500 evaluation.patience=5
      msdiff train --preset fashion-mnist --out runs/timed --profile
      msdiff train --resume runs/digits
      msdiff train --resume runs/digits --set training.steps=20000
      torchrun --nproc-per-node 4 -m multistage_diffusion train --preset digits --out runs/four --strategy memory
    """

    images: Annotated[Positional[str | None], tyro.conf.arg(name="DATA", metavar="DATA")] = None
    """The images to train on; as --data."""
    preset: Annotated[str | None, option("NAME", "auto")] = None
    """The preset; auto chooses for the images and this device; msdiff presets lists them, msdiff describe NAME shows one."""
    config: Annotated[Path | None, option("FILE")] = None
    """A configuration file instead of a preset: JSON or YAML, e.g. the config.json of a run."""
    data: Annotated[str | None, data_option("the preset's")] = None
    stages: Annotated[Path | None, option("FILE", "the preset's")] = None
    """The stages.json of msdiff stages."""
    borrow: bool = False
    """Accept --stages that were found on other images."""
    codec: Annotated[str | None, option("CODEC", "the preset's; most presets train on pixels")] = None
    """Train on the latents of this autoencoder: a folder (msdiff train-codec) or hf:NAME."""
    init_from: Annotated[Path | None, option("RUN")] = None
    """A trained run from which the weights start: of the encoder, and of every decoder of the same width; without a preset,
    network and settings are that run's."""
    out: Annotated[Path | None, option("FOLDER")] = None
    """The run's new folder."""
    resume: Annotated[Path | None, option("RUN")] = None
    """A run to resume from its latest checkpoint."""
    set: Changes = ()
    """Changes to the preset, e.g. optimizer.lr=1e-4 network.decoder_widths=[64,48,16]."""
    print_config: bool = False
    """Print the configuration as YAML and train nothing."""
    replace: bool = False
    """Move an existing run at OUT aside."""
    strategy: Annotated[str, option(one_of(STRATEGIES), "time")] = "time"
    """What each process of torchrun holds: time: the whole network; memory: the decoders of its stages; fsdp: a slice of all."""
    profile: bool = False
    """Measure the times of the parts of some steps, print them, and write a trace to RUN/profile."""
    track: Annotated[tuple[str, ...] | None, option("TRACKER ...", "none, or those of the run that is resumed")] = None
    """Programs that receive metrics, samples and the configuration: tensorboard, wandb, trackio; none for none."""
    device: Device = None
    """cpu, cuda or cuda:N"""

    def run(self) -> None:
        """Run the command."""
        changes = self.changes()
        if self.resume is None:
            self.check_new()
        if self.print_config:
            self.show(changes)
            return
        if self.profile and self.resume is not None:
            require_profile_place(self.resume)
        with TrainingProgress() as progress, Bar("encoding", "images") as bar:
            callbacks: list[Callback[Trainer]] = [progress]
            if self.profile:
                callbacks.append(Profile(console.print))
            train_run = self.start if self.resume is None else self.continue_run
            run = train_run(changes, callbacks, bar)
        if not is_main_process():
            return
        say(
            f"trained: {run.path} (next: msdiff sample {run.path}, msdiff evaluate {run.path}, msdiff report {run.path})"
        )

    def check_new(self) -> None:
        """Check the options of a new run, before anything is read."""
        if self.preset is not None and self.config is not None:
            raise UserError("--preset NAME and --config FILE both give the settings; give one of them")
        if self.out is None and not self.print_config:
            raise UserError("--out is missing: name the new run's folder (or --resume RUN)")
        if self.out is not None and not in_many():  # several processes may resume a run there
            Run.require_room(self.out, replace=self.replace)

    def show(self, changes: dict[str, Any]) -> None:
        """Print the configuration as YAML."""
        if self.resume is not None:
            config = override(Run.open(self.resume).config(), changes)
        else:
            chosen = self.chosen(changes)
            stages = {} if chosen.result is None else {"stages": chosen.result.stages()}
            config = override(chosen.config, {**stages, **chosen.changes})
        say(yaml.safe_dump(to_dict(config), sort_keys=False).rstrip())

    def changes(self) -> dict[str, Any]:
        """Return the options that change the configuration as one mapping of dotted keys."""
        if self.images is not None and self.data is not None:
            raise UserError(f"DATA {self.images} and --data {self.data} both name the images; give one of them")
        options = {
            "data.source": self.data if self.images is None else self.images,
            **self.dotted(),
            "codec.source": self.codec,
            "training.init_from": None if self.init_from is None else str(self.init_from),
        }
        changes = dotted_changes(options, self.set)
        if self.stages is not None and any(key.startswith("stages.") for key in changes):
            raise UserError("--stages FILE and --set stages.... both give the stages; give one of them")
        return changes

    def continue_run(self, changes: dict[str, Any], callbacks: Sequence[Callback[Trainer]], bar: Bar) -> Run:
        """Resume a run."""
        for name in ("preset", "config", "stages", "borrow", "init_from", "out", "replace"):
            if getattr(self, name):
                raise UserError(
                    f"--{name.replace('_', '-')} does not go with --resume: it is for new runs; leave it out"
                )
        assert self.resume is not None
        return resume(
            self.resume,
            changes,
            device=self.device,
            strategy=self.strategy,
            callbacks=callbacks,
            trackers=None if self.track is None else self.trackers(),
            progress=bar,
        )

    def trackers(self) -> tuple[str, ...]:
        """Return the trackers that were asked for."""
        return () if self.track is None or self.track == ("none",) else self.track

    def start(self, changes: dict[str, Any], callbacks: Sequence[Callback[Trainer]], bar: Bar) -> Run:
        """Start a run."""
        assert self.out is not None
        chosen = self.chosen(changes)
        return train(
            chosen.config,
            self.out,
            chosen.changes,
            result=chosen.result,
            borrow=self.borrow,
            replace=self.replace,
            device=self.device,
            strategy=self.strategy,
            callbacks=callbacks,
            trackers=self.trackers(),
            progress=bar,
        )

    def of_another_codec(self, config: RunConfig) -> RunConfig:
        """Return a configuration without what belongs to its codec (subfolder, scale, ...) if --codec names another."""
        if self.codec in (None, config.codec.source):
            return config
        return dataclasses.replace(config, codec=CodecConfig())

    def chosen(self, changes: dict[str, Any]) -> Chosen:
        """Return the configuration of a new run: of a preset or a file, or chosen for the images."""
        result = None if self.stages is None else StageResult.load(self.stages)
        if self.config is not None:
            return Chosen(self.of_another_codec(load_config(self.config)), changes, result)
        if self.preset not in (None, AUTO):
            return Chosen(self.of_another_codec(preset(self.preset or "")), changes, result)
        if "data.source" not in changes:
            raise UserError("DATA is missing: name the images (or give --preset NAME, --config FILE or --resume RUN)")
        choose = auto_config if self.init_from is None else partial(config_from_run, str(self.init_from))
        with Bar("encoding", "images") as bar:
            auto = choose(
                changes["data.source"], changes, result=result, borrow=self.borrow, device=self.device, progress=bar
            )
        console.print(auto.table())
        return Chosen(auto.config, {}, auto.result)
