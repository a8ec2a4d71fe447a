"""The registry of trackers, and their base class.

One more module in this folder adds a tracker:

    @TRACKERS.add("csv")
    class CSV(Tracker):
        def scalars(self, step: int, values: Mapping[str, float]) -> None: ...
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..config.serialization import read_json
from ..errors import UserError
from ..files import write_json
from ..reading import brief
from ..registry import Registry

MEMORY = "trackers.json"  # in the run's folder: the names of its trackers, and what each of them keeps
EXTRAS = {"tensorboard": "track"}  # the extra that installs a tracker's package, if it has another name
ALONE = ("trackio",)  # packages that the extra cannot name, because they refuse the Pillow of this one


class Tracker:
    """Receives what a run logs; every method does nothing unless overridden.

    An instance is made before training starts; its __init__ raises UserError if a package is missing. The methods are
    called on the main process only.
    """

    def open(self, folder: Path, step: int) -> None:
        """Training starts or resumes at a step; what was received for later steps of this run is received again.

        Args:
            folder: the run's folder.
            step: steps done.
        """

    def config(self, config: dict[str, Any]) -> None:
        """Receive the run's configuration, once after `open`."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Receive numbers of metrics.jsonl by name, such as "loss/train/stage 1", "lr", "gradient norm/encoder"."""

    def evaluation(self, step: int, petaflops: float, values: Mapping[str, float]) -> None:
        """Receive the values of an evaluation during training, such as "quality/frechet".

        Args:
            step: steps done.
            petaflops: training compute so far, in 1e15 operations.
            values: the values by name.
        """
        self.scalars(step, values)

    def images(self, step: int, grid: Image.Image) -> None:
        """Receive a grid of samples."""

    def close(self) -> None:
        """Training has ended, also after an error."""


TRACKERS: Registry[Callable[[], Tracker]] = Registry("track", __package__)


def not_installed(name: str) -> UserError:
    """Return the error for a tracker whose package is missing."""
    command = f"pip install 'multistage-diffusion[{EXTRAS.get(name, name)}]'"
    if name in ALONE:
        command += f" && pip install --no-deps {name}"
    return UserError(f"{name} is not installed: {command}; or leave it out (--track none)")


def tracked(folder: Path) -> tuple[str, ...]:
    """Return the names of the trackers that a run was last trained with.

    Raises:
        UserError: if the run's record of them is damaged.
    """
    names = _memory(folder).get("track", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{folder / MEMORY}: track={brief(names)} must be a list of names; delete the file")
    return tuple(names)


def track(folder: Path, names: Sequence[str]) -> None:
    """Record the names of a run's trackers, for when it is resumed."""
    if tuple(names) != tracked(folder):
        write_json(folder / MEMORY, {**_memory(folder), "track": list(names)})


def recall(folder: Path, name: str) -> dict[str, Any]:
    """Return what a tracker has kept about a run; {} if nothing.

    Raises:
        UserError: if the run's record is damaged.
    """
    kept = _memory(folder).get("kept", {})
    found = kept.get(name, {}) if isinstance(kept, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{folder / MEMORY}: kept={brief(kept)} must be mappings by name; delete the file")
    return found


def remember(folder: Path, name: str, value: dict[str, Any]) -> None:
    """Keep something about a run for a tracker, such as the run's name in the other program."""
    if recall(folder, name) != value:
        memory = _memory(folder)
        write_json(folder / MEMORY, {**memory, "kept": {**memory.get("kept", {}), name: value}})


def _memory(folder: Path) -> dict[str, Any]:
    path = folder / MEMORY
    found = read_json(path) if path.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a mapping, got {brief(found)}; delete it")
    return found
