"""Checkpoints: folders written atomically, with safetensors and JSON files only.

checkpoints/step_00001000/model.safetensors      weights
                          ema.safetensors        averaged weights
                          ema_0.05.safetensors   the average of each width in training.ema_profiles (if any)
                          optimizer.safetensors  the optimiser's state, keyed by parameter name; learned weights of noise
                                                 levels
                          state.json             step, images, held-out score, quality (the Fréchet distance, if the
                                                 step was evaluated), running sums, loss scaler, the whole run
                                                 configuration, size and sha256 of the other files

Snapshots are folders of the same form, with the averages of training.ema_profiles and a state of step and digests:
ema/step_00001000/ema_0.05.safetensors ...
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..config import RunConfig
from ..config.serialization import from_dict, read_json, to_dict
from ..errors import UserError
from ..files import json_bytes, make_folder, new_folder, remove_folder, write_file
from .optimizer_state import Local, state_of, whole_tensor
from .optimizer_state import optimizer_tensors as optimizer_tensors
from .optimizer_state import restore_optimizer as restore_optimizer

_PREFIX, _TEMPORARY = "step_", ".writing-"
_MOST_STAGES = 1000  # upper bound of the stages of a network
SNAPSHOTS = "ema"  # folder of a run's snapshots
_DIGESTS = "files"  # key in state.json: bytes and sha256 of the other files
FILES = ("model", "ema", "optimizer")


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint: tensors by file, and JSON-serialisable state (with at least `step`).

    `profiles` are the averages of training.ema_profiles, by `profile_file`.
    """

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    profiles: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def profile_file(sigma_rel: float) -> str:
    """Return the name, without suffix, of the file of an average with a power-function profile of this width."""
    return f"ema_{sigma_rel}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically: temporary name, fsync of every file, rename. Older checkpoints are not touched.

    Raises:
        OSError: if it cannot be written (for example, the disk is full); existing checkpoints stay intact.
    """
    files = {name: getattr(checkpoint, name) for name in FILES} | checkpoint.profiles
    return _save(folder, files, checkpoint.state)


def save_snapshot(folder: Path, step: int, profiles: Mapping[str, dict[str, Tensor]]) -> Path:
    """Write a snapshot of the averages of training.ema_profiles, as atomically as a checkpoint.

    Args:
        folder: of the snapshots.
        step: of the averages.
        profiles: tensors of each average, by `profile_file`.

    Raises:
        OSError: if it cannot be written.
    """
    return _save(folder, profiles, {"step": step})


def _save(folder: Path, tensors: Mapping[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Write a folder of tensors by file, with the state and the digests of these files."""
    make_folder(folder)
    for leftover in folder.glob(f"{_TEMPORARY}*"):  # from earlier releases
        shutil.rmtree(leftover, ignore_errors=True)
    final = folder / f"{_PREFIX}{state['step']:08d}"
    with new_folder(final, replace=True) as temporary:  # the same step may be saved again
        files = {}
        for name, content in tensors.items():
            data = save(_apart(content))
            write_file(temporary / f"{name}.safetensors", data)
            files[f"{name}.safetensors"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        record = {**to_dict(state), _DIGESTS: files}
        write_file(temporary / "state.json", json_bytes(final / "state.json", record))
    return final


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous CPU tensors, each with its own memory (stages may share their decoders)."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        stored[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return stored


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; folders with other names (a user's copy) are ignored."""
    named = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdecimal()]
    return sorted((p for p in named if (p / "state.json").exists()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(path.name.removeprefix(_PREFIX))


def refuse_newer(folder: Path, step: int) -> None:
    """Raise UserError if a checkpoint is newer than this step: another process has trained the run meanwhile."""
    found = list_checkpoints(folder)
    if found and checkpoint_step(found[-1]) > step:
        raise UserError(
            f"{folder.parent}: another process has trained it to step {checkpoint_step(found[-1])}; resume again"
        )


def drop_newer(folder: Path, step: int) -> None:
    """Delete the snapshots after a checkpoint's step; these steps will run again."""
    for path in list_checkpoints(folder):
        if checkpoint_step(path) > step:
            remove_folder(path)


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json without the digests of the other files.

    Raises:
        UserError: if the file cannot be read or a field is invalid; the message names the file and the field.
    """
    state = _read_state(path)
    state.pop(_DIGESTS, None)
    return state


def _read_state(path: Path) -> dict[str, Any]:
    file = path / "state.json"
    try:
        state = read_json(file)
    except UserError as error:
        raise UserError(f"{error}; {_mend(path)}") from None
    if not isinstance(state, dict):
        raise UserError(f"{file}: expected a mapping, got {type(state).__name__}; {_mend(path)}")
    for name, (right, wanted) in _FIELDS.items():
        if (name in state or name == "step") and not right(state.get(name)):
            raise UserError(f"{file}: {name}={str(state.get(name))[:80]} must be {wanted}; {_mend(path)}")
    if path.name.removeprefix(_PREFIX).isdecimal() and state["step"] != checkpoint_step(path):
        raise UserError(f"{file}: step={state['step']} is not that of its folder; {_mend(path)}")
    return state


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_digests(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(said, dict) and _is_count(said.get("bytes")) and isinstance(said.get("sha256"), str)
        for said in value.values()
    )


_SCALER = {"scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker"}  # of torch.amp.GradScaler
# field of state.json -> (test of the value, description of valid values)
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "step": (_is_count, "a number of steps"),
    "images": (_is_count, "a number of images"),
    "score": (lambda value: value is None or _is_number(value), "a finite number or null"),
    "quality": (lambda value: value is None or _is_number(value), "a finite number or null"),
    "seconds": (_is_number, "a finite number"),
    "sums": (lambda value: isinstance(value, dict), "a mapping"),
    "scaler": (
        lambda value: (
            isinstance(value, dict) and all(map(_is_number, value.values())) and value.keys() in (set(), _SCALER)
        ),
        f"empty, or numbers for {', '.join(sorted(_SCALER))}",
    ),
    "config": (lambda value: isinstance(value, dict), "a mapping"),
    _DIGESTS: (_is_digests, "bytes and sha256 of each file"),
}


def trained_config(path: Path) -> RunConfig:
    """Return the configuration of the run that wrote a checkpoint.

    Raises:
        UserError: if state.json is damaged; the message names it.
    """
    state = read_state(path)
    try:
        config = from_dict(RunConfig, state.get("config"), "config")
    except UserError as error:
        raise UserError(f"{path / 'state.json'}: {error}; {_mend(path)}") from None
    return config


def _mend(path: Path) -> str:
    """Return advice for a damaged checkpoint: how to resume from the one before it."""
    if path.parent.name == SNAPSHOTS:
        return f"delete {path}; the other snapshots remain"
    older = [p for p in list_checkpoints(path.parent) if checkpoint_step(p) < checkpoint_step(path)]
    if not older:
        return f"{path} is damaged and there is none before it: train the run anew"
    return f"delete {path} to go on from the checkpoint before it, of step {checkpoint_step(older[-1])}"


def load_tensors(
    path: Path, name: str, wanted: Collection[str] | None = None, whole: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the tensors of a file of a checkpoint, on the CPU.

    Args:
        path: the checkpoint's folder.
        name: file name without suffix.
        wanted: names of the tensors to read (for "optimizer": of the parameters). None: all.
        whole: all names that the file may hold. None: any.

    Raises:
        UserError: if the file is missing, damaged or replaced, or holds other names than `whole`; the message names it.
    """
    with _opened(path, name) as stored:
        keys = list(stored.keys())
        named = state_of if name == "optimizer" else str
        others = [key for key in keys if whole is not None and named(key) not in whole]
        if others:
            raise _Damaged(f"it holds {others[0]}, which the network does not have")
        return {key: stored.get_tensor(key) for key in keys if wanted is None or named(key) in wanted}


def stored_tensors(path: Path, name: str, like: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and tensors of a file of a checkpoint or snapshot, one at a time, on the CPU.

    Args:
        path: the folder.
        name: file name without suffix.
        like: tensors of the same names, shapes and dtypes; the file may hold others.

    Raises:
        UserError: if the file is missing, damaged or replaced, or a tensor is missing, different or not finite.
    """
    with _opened(path, name) as stored:
        keys = set(stored.keys())
        for key, wanted in like.items():
            value: Tensor | None = stored.get_tensor(key) if key in keys else None
            fault = _fault(value, wanted)
            if value is None or fault:
                raise _Damaged(f"{key} {fault}")
            yield key, value


@contextmanager
def _opened(path: Path, name: str) -> Iterator[Any]:
    """Open a file of a checkpoint after checking its digest.

    Raises:
        UserError: if it is missing, damaged or replaced, or the block raises _Damaged.
    """
    file = path / f"{name}.safetensors"
    known = _read_state(path).get(_DIGESTS)
    try:
        if file.exists() and not file.is_file():  # opening a FIFO would block
            raise _Damaged("it is a folder, a FIFO or a device")
        if known is not None:
            _check_digest(file, known.get(file.name, {}))
        with safe_open(file, framework="pt") as stored:
            yield stored
    except (SafetensorError, OSError, _Damaged) as error:
        raise UserError(
            f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}); {_mend(path)}"
        ) from None


class _Damaged(Exception):
    """A file does not match the description in its checkpoint."""


def _check_digest(file: Path, said: dict[str, Any]) -> None:
    with file.open("rb") as stream:
        size = file.stat().st_size
        if size != said.get("bytes"):
            raise _Damaged(f"it has {size} bytes; {said.get('bytes', 'none')} were written")
        if hashlib.file_digest(stream, "sha256").hexdigest() != said.get("sha256"):
            raise _Damaged("its content is not what was written: its sha256 differs from that in state.json")


def restore_module(
    module: nn.Module, path: Path, name: str, whole: Collection[str] | None = None, local: Local = whole_tensor
) -> None:
    """Load the weights of "model", "ema" or another average into a network, or what serves training only from "optimizer".

    Args:
        module: the network, or a part of it.
        path: the checkpoint's folder.
        name: file name without suffix.
        whole: names of all tensors of the saved network, if module is a part of it. None: module is the whole network.
        local: returns what this process holds of a saved tensor.

    Raises:
        UserError: if the file is damaged or has missing or unknown tensors, or a tensor has another shape or dtype or
            is not finite.
    """
    own = module.state_dict()
    wanted = set(map(state_of, own)) if name == "optimizer" else own
    tensors = load_tensors(path, name, wanted, own if whole is None else whole)
    for key, value in own.items():
        fault = _fault(tensors.get(key), value)
        if fault:
            raise UserError(f"{path / f'{name}.safetensors'}: {key} {fault}; {_mend(path)}")
    module.load_state_dict({key: local(value, own[key]) for key, value in tensors.items()})


def _fault(given: Tensor | None, wanted: Tensor) -> str:
    if given is None:
        return "is missing"
    if given.dtype != wanted.dtype or given.shape != wanted.shape:
        return f"is {given.dtype} {list(given.shape)}, not {wanted.dtype} {list(wanted.shape)}"
    return "" if bool(torch.isfinite(given).all()) else "is not finite"


def restore_moments(
    optimizer: torch.optim.Optimizer,
    module: nn.Module,
    path: Path,
    whole: Collection[str] | None = None,
    local: Local = whole_tensor,
) -> None:
    """Load the "optimizer" file of a checkpoint into an optimiser over a network's parameters; see `restore_module`.

    Raises:
        UserError: if the file is damaged, empty although steps were made, or does not match the optimiser.
    """
    state = read_state(path)
    own = {name for name, _ in module.named_parameters()}
    tensors = load_tensors(path, "optimizer", own, own if whole is None else whole)
    try:
        if state["step"] and not tensors and not state.get("scaler"):  # an fp16 scaler may have skipped every step
            raise UserError("holds nothing of any parameter")
        # update_mode "sequential" makes one optimiser step per stage
        restore_optimizer(optimizer, module, tensors, state["step"] * _MOST_STAGES, local)
    except UserError as error:
        raise UserError(f"{path / 'optimizer.safetensors'}: {error}; {_mend(path)}") from None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint with the lowest `quality`, or else the lowest `score`; None if no checkpoint has either."""
    states = [(read_state(p), p) for p in list_checkpoints(folder)]
    for name in ("quality", "score"):
        known = [(state[name], p) for state, p in states if state.get(name) is not None]
        if known:
            return min(known)[1]
    return None


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all checkpoints except the newest `keep_last`, the best, and those every `keep_every` steps."""
    found = list_checkpoints(folder)
    best = best_checkpoint(folder)
    for path in found[:-keep_last]:
        if path != best and not (keep_every and checkpoint_step(path) % keep_every == 0):
            remove_folder(path)
