"""The folder of a run: its files, opening, locking and logging.

RUN/config.json      the run configuration
RUN/stages.json      the stage-finding result of its stages (if any)
RUN/metrics.jsonl    losses and evaluations
RUN/launches.jsonl   every command that trained the run
RUN/imported.json    the file from which the run was imported (if any)
RUN/trackers.json    the trackers (if any), and what each of them keeps
RUN/execution.json   the autotuning result (if autotuning ran)
RUN/evaluation.json  results of msdiff evaluate
RUN/likelihood.json  results of msdiff evaluate --likelihood
RUN/checkpoints/     see checkpoint.py
RUN/ema/             snapshots of averages, see checkpoint.py (if training.ema_profiles has widths)
RUN/samples/         sample grids from training
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

import torch

from ..config import DataConfig, RunConfig
from ..config.serialization import from_dict, read_json
from ..data import ImageData
from ..data.sources import open_configured
from ..denoisers import MultiStageDenoiser, build_denoiser
from ..errors import UserError
from ..files import append_line, json_bytes, locked, move_aside, new_folder, write_atomic, write_file, write_json
from ..output_paths import require_room, require_utf8
from ..performance.devices import device_name
from ..performance.execution import Execution
from ..reading import brief
from ..records import read_launches, read_metrics
from ..stale_files import sweep
from ..version import __version__
from .checkpoint import (
    SNAPSHOTS,
    best_checkpoint,
    checkpoint_step,
    list_checkpoints,
    restore_module,
    trained_config,
)
from .post_hoc_ema import load_average

OWN_FILES = (
    "config.json",
    "stages.json",
    "metrics.jsonl",
    "launches.jsonl",
    "imported.json",
    "execution.json",
    "evaluation.json",
    "likelihood.json",
    "trackers.json",
)


@dataclass(frozen=True)
class Run:
    """The folder of a run."""

    path: Path

    @property
    def config_file(self) -> Path:
        """File of the run configuration."""
        return self.path / "config.json"

    @property
    def imported_file(self) -> Path:
        """Record of the imported file; an imported run without a checkpoint is incomplete."""
        return self.path / "imported.json"

    @property
    def metrics_file(self) -> Path:
        """File of losses and evaluations, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def snapshots(self) -> Path:
        """The folder of snapshots of the averages of training.ema_profiles."""
        return self.path / SNAPSHOTS

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, *, replace: bool = False, fill: Callable[[Run], object] | None = None
    ) -> Run:
        """Create the folder of a run.

        Args:
            path: the new folder.
            config: the run configuration.
            replace: move an existing run to PATH.replaced-TIME instead of raising.
            fill: writes further files of the run, before the folder gets its final name.

        Raises:
            UserError: if path holds something that is not to be replaced, or cannot be written.
        """
        taken = cls.require_room(path, replace=replace)
        with new_folder(path) as folder:
            write_file(folder / "config.json", json_bytes(path / "config.json", config))
            if fill is not None:
                fill(cls(folder))
            if taken:  # last, so that an earlier error leaves the existing run in place
                with cls(path).locked() if cls(path).config_file.exists() else nullcontext():
                    move_aside(path)
        return cls(path)

    @staticmethod
    def require_room(path: Path, *, replace: bool) -> bool:
        """Check in advance that a run can be created at a path, see `files.require_room`."""
        mend = f"resume it (--resume {path})" if Run(path).config_file.exists() else "it is not a run"
        return require_room(path, mend, replace=replace)

    @classmethod
    def open(cls, path: Path | str) -> Run:
        """Open an existing run.

        Raises:
            UserError: if there is no run.
        """
        run = cls(Path(path))
        require_utf8(run.path)
        if not run.config_file.exists():
            if list_checkpoints(run.checkpoints):
                raise UserError(f"{path}: has checkpoints, but no {run.config_file.name}; put this file back")
            raise UserError(
                f"{path}: not a run (no {run.config_file.name}); name the folder that msdiff train --out made"
            )
        return run

    def config(self) -> RunConfig:
        """Read the run configuration."""
        try:
            return from_dict(RunConfig, read_json(self.config_file))
        except UserError as error:
            raise UserError(f"{self.config_file}: {error}") from None

    def data(self, config: DataConfig | None = None) -> ImageData:
        """Open the run's whole data set.

        Args:
            config: the data's new location, if they have moved; default: the run's own data configuration.

        Raises:
            UserError: if the data differ from those of the run, or the run was imported and has no data.
        """
        config = config or self.config().data
        if not config.source:
            raise UserError(f"data.source is empty: {self.path} was imported without data; give --data")
        try:
            return open_configured(config)
        except UserError as error:
            if Path(config.source).is_absolute() and not Path(config.source).exists():
                raise UserError(
                    f"data.source={config.source}: the images of {self.path} are no longer there; put them back, or name "
                    "their new place (--data)"
                ) from error
            raise

    def checkpoint(self, which: str = "best") -> Path:
        """Return the folder of a checkpoint.

        Args:
            which: "latest", "best" (lowest Fréchet distance, or else held-out loss; the latest if none has either) or a
                step.

        Raises:
            UserError: if there is no such checkpoint; the message lists the existing ones.
        """
        found = list_checkpoints(self.checkpoints)
        if not found:
            raise UserError(f"{self.path}: has no checkpoint yet; continue it with msdiff train --resume {self.path}")
        if which == "latest":
            return found[-1]
        if which == "best":
            return best_checkpoint(self.checkpoints) or found[-1]
        for path in found:
            if which.isdecimal() and checkpoint_step(path) == int(which):
                return path
        steps = ", ".join(str(checkpoint_step(p)) for p in found)
        raise UserError(f"checkpoint {which!r}: not kept in {self.path}; choose latest, best or one of {steps}")

    def denoiser(
        self,
        which: str = "best",
        weights: Literal["ema", "model"] | float = "ema",
        device: torch.device | str = "cpu",
    ) -> MultiStageDenoiser:
        """Load a checkpoint's denoiser, ready for sampling.

        Args:
            which: see `checkpoint`.
            weights: averaged weights ("ema"), those in training ("model"), or the width sigma_rel of the average of a
                power-function profile, computed from the run's snapshots, see `post_hoc_ema`.
            device: for the denoiser.

        Raises:
            UserError: if there is no such checkpoint, its network, diffusion or stages differ from config.json, or the run
                has no snapshots for this width.
        """
        folder, config = self.checkpoint(which), self.config()
        trained = trained_config(folder)
        # what an imported checkpoint does not record of its codec is not compared
        recorded = [n for n in ("codec.shape", "codec.scale", "codec.fingerprint") if attrgetter(n)(trained)]
        for name in ("network", "diffusion", "stages", "data.shape", "codec.used", *recorded):
            if attrgetter(name)(trained) != attrgetter(name)(config):
                raise UserError(
                    f"{self.config_file}: {name} was edited since step {checkpoint_step(folder)}; put it back (the "
                    f"checkpoint's own configuration is in {folder / 'state.json'})"
                )
        denoiser = build_denoiser(trained)
        if isinstance(weights, str):
            restore_module(denoiser, folder, weights)
        else:
            load_average(denoiser, folder, self.snapshots, trained.training.ema_profiles, weights)
        return denoiser.to(device).eval().requires_grad_(False)

    def records(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; an incomplete last line (killed process) is ignored."""
        return read_metrics(self.metrics_file)

    def check_records(self) -> None:
        """Check in advance that the files needed to resume the run can be read.

        Raises:
            UserError: if a file cannot be read (the message names it), or the checkpoints have been removed.
        """
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise UserError(f"{self.checkpoints}: is a file, not the folder of checkpoints; move it away")
        records = self.records()
        read_launches(self.path / "launches.jsonl")
        if self.execution_file.exists() and not isinstance(read_json(self.execution_file), dict):
            raise UserError(f"{self.execution_file}: must hold a mapping; delete it, and autotuning runs again")
        reached = max((record["step"] for record in records), default=0)
        if not list_checkpoints(self.checkpoints) and reached > self.config().training.checkpoint_every:
            raise UserError(
                f"{self.checkpoints}: holds no checkpoint, but {self.metrics_file.name} has records up to step {reached}; "
                f"restore the checkpoints, or delete {self.metrics_file} to train from step 0"
            )

    def rewind_metrics(self, step: int) -> None:
        """Drop the records after a checkpoint's step; these steps will run again."""
        kept = [r for r in self.records() if r["step"] <= step]
        write_atomic(self.metrics_file, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def log(self, record: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl."""
        append_line(self.metrics_file, record)

    def log_launch(self, device: torch.device) -> None:
        """Append the command that trains this run to launches.jsonl."""
        launch = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": _command(),
            "version": __version__,
            "torch": torch.__version__,
            "device": device_name(device),
        }
        file = self.path / "launches.jsonl"
        lines = [
            json.dumps(record) + "\n" for record in (*read_launches(file), launch)
        ]  # without an incomplete last line
        write_atomic(file, "".join(lines).encode())

    @property
    def execution_file(self) -> Path:
        """File of the autotuning result."""
        return self.path / "execution.json"

    def known_execution(self, here: dict[str, Any]) -> dict[str, bool] | None:
        """Return the stored autotuning result if it is from the same device and settings, else None.

        Raises:
            UserError: if the file is damaged.
        """
        if not self.execution_file.exists():
            return None
        known = read_json(self.execution_file)
        mend = "delete it, and autotuning runs again"
        if not isinstance(known, dict):
            raise UserError(f"{self.execution_file}: expected a mapping, got {brief(known)}; {mend}")
        if any(known.get(key) != value for key, value in here.items()):
            return None
        try:
            found = from_dict(Execution, known.get("execution"), "execution")
        except UserError as error:
            raise UserError(f"{self.execution_file}: {error}; {mend}") from None
        if found.thread_parallel < 1:
            raise UserError(
                f"{self.execution_file}: execution.thread_parallel={found.thread_parallel} must be positive; {mend}"
            )
        return asdict(found)

    def remember_execution(self, here: dict[str, Any], execution: Execution, seconds: dict[str, float]) -> None:
        """Store the autotuning result, with the seconds per step of each candidate."""
        write_json(self.execution_file, {**here, "execution": execution, "seconds": seconds})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the run, so that only one process trains it.

        Raises:
            UserError: if another process holds the lock.
        """
        with locked(self.path / ".lock", f"{self.path}: another process is training this run; wait for it or stop it"):
            sweep(self.path)
            yield


def belongs_to_a_run(path: Path) -> bool:
    """Return whether a path is a file that a run needs or that records its results; other files in its folder are not."""
    run = Run(path.absolute().parent)
    if run.config_file.exists() and run.checkpoints.is_dir():
        return path.name in OWN_FILES
    return any(
        place.name in ("checkpoints", SNAPSHOTS) and Run(place.parent).config_file.exists()
        for place in path.absolute().parents
    )


def _command() -> str:
    """Return the command that this process is, as a user would type it."""
    program = os.path.basename(sys.argv[0])
    words = ["python", "-m", __name__.partition(".")[0]] if program == "__main__.py" else [program]
    return shlex.join([*words, *sys.argv[1:]])
