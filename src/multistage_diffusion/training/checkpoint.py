"""Checkpoints: a folder that is either wholly there or not at all, holding safetensors and JSON only.

checkpoints/step_00001000/model.safetensors      weights
                          ema.safetensors        averaged weights
                          optimizer.safetensors  Adam's moments, named after their parameters
                          state.json             step, images, held-out score, quality (the Fréchet distance, where the
                                                 step was evaluated), running sums, the whole run configuration
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import UserError
from ..files import sync_folder
from ..serialization import read_json, to_dict

_PREFIX, _TEMPORARY = "step_", ".writing-"


@dataclass(frozen=True)
class Checkpoint:
    """What is saved: tensors by file, and JSON-able state (holding at least `step`)."""

    model: dict[str, Tensor]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint under a temporary name, fsync every file, then rename: an older one is never touched.

    Raises:
        OSError: if it cannot be written (a full disk); what was there before is intact.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{_PREFIX}{checkpoint.state['step']:08d}"
    temporary = folder / f"{_TEMPORARY}{final.name}"
    for leftover in folder.glob(f"{_TEMPORARY}*"):  # of a process killed in mid-write or mid-delete
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir()
        for name in ("model", "ema", "optimizer"):
            _write(temporary / f"{name}.safetensors", save(_apart(getattr(checkpoint, name))))
        _write(temporary / "state.json", json.dumps(to_dict(checkpoint.state), indent=1).encode())
        sync_folder(temporary)
        if final.exists():  # the same step saved again
            _delete(final)
        os.rename(temporary, final)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return final


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as they are stored: on the CPU, each in memory of its own (stages may share their decoders)."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in tensors.items():
        value = value.detach().cpu().contiguous()
        stored[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    return stored


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, oldest first; a folder of another name (a user's copy) is none."""
    named = [p for p in folder.glob(f"{_PREFIX}*") if p.name.removeprefix(_PREFIX).isdigit()]
    return sorted((p for p in named if (p / "state.json").exists()), key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Return the step of a checkpoint folder."""
    return int(path.name.removeprefix(_PREFIX))


def refuse_newer(folder: Path, step: int) -> None:
    """Raise UserError if another process has trained the run since it was opened at this step."""
    found = list_checkpoints(folder)
    if found and checkpoint_step(found[-1]) > step:
        raise UserError(
            f"{folder.parent}: another process has trained it to step {checkpoint_step(found[-1])}; resume again"
        )


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's state.json."""
    state: dict[str, Any] = read_json(path / "state.json")
    return state


def load_tensors(path: Path, name: str, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
    """Return "model", "ema" or "optimizer" tensors of a checkpoint, on the CPU.

    Args:
        path: the checkpoint's folder.
        name: of the file.
        wanted: names of tensors; those of others are not read. None: all.

    Raises:
        UserError: if the file is missing or damaged, naming it.
    """
    file = path / f"{name}.safetensors"
    try:
        with safe_open(file, framework="pt") as stored:
            keys = list(stored.keys())
            return {key: stored.get_tensor(key) for key in keys if wanted is None or key in wanted}
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); delete {path} to go on from the checkpoint before it"
        ) from None


def best_checkpoint(folder: Path) -> Path | None:
    """Return the kept checkpoint with the lowest `quality`, or else the lowest `score`; None if none has either."""
    states = [(read_state(p), p) for p in list_checkpoints(folder)]
    for name in ("quality", "score"):
        known = [(state[name], p) for state, p in states if state.get(name) is not None]
        if known:
            return min(known)[1]
    return None


def prune(folder: Path, keep_last: int, keep_every: int) -> None:
    """Delete all checkpoints but the newest ones, the best, and every keep_every steps."""
    found = list_checkpoints(folder)
    best = best_checkpoint(folder)
    for path in found[:-keep_last]:
        if path != best and not (keep_every and checkpoint_step(path) % keep_every == 0):
            _delete(path)


def _delete(path: Path) -> None:
    """Delete a checkpoint, renamed first: a half-deleted one is never taken for a whole one."""
    doomed = path.with_name(f"{_TEMPORARY}deleted-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, Tensor]:
    """Return an optimiser's state as named tensors; parameters never stepped have none."""
    return {
        f"{name}.{key}": value
        for name, parameter in module.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put named tensors back into an optimiser, bit for bit; those of parameters that the module lacks are left out."""
    parameters = dict(module.named_parameters())
    for key, value in tensors.items():
        name, field = key.rsplit(".", 1)
        if name not in parameters:
            continue
        parameter = parameters[name]
        # Adam's step counter stays on the CPU unless the optimiser is fused on the parameter's device
        target = parameter.device if field != "step" or optimizer.param_groups[0].get("fused") else torch.device("cpu")
        optimizer.state[parameter][field] = value.to(target)
