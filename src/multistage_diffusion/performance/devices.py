"""Where a run is trained and in which arithmetic."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from typing import Literal

import torch

from ..distributed import World, join
from ..errors import UserError


def joined(device: str | torch.device | None, command: str) -> tuple[World, torch.device]:
    """Return the processes that work together with this one, and where it computes: a GPU each, where "cuda" is all that is said.

    Args:
        device: cpu, cuda, cuda:N; None: CUDA when there is one.
        command: what all processes are about to do together.

    Raises:
        UserError: if there is no such device, the processes' environment is incomplete, or they were given different commands.
    """
    resolved = resolve_device(device)
    if resolved.type == "cuda" and resolved.index is None and "LOCAL_RANK" in os.environ:
        resolved = resolve_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(resolved)
    world = join(resolved)
    with world.report_failures():
        world.require_equal({"command": command})
    return world, resolved


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return the device asked for, or CUDA when there is one, else the CPU.

    Raises:
        UserError: if CUDA is asked for and absent.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is unknown; use cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):  # the noise is drawn in float64, which others lack
        raise UserError(f"device={str(device)!r} is not supported; use cpu, cuda or cuda:N")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(device)!r}: no CUDA device is available; use --device cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={str(device)!r}: there are {torch.cuda.device_count()} CUDA devices; use a lower number"
        )
    return resolved


# of malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4

Precision = Literal["fp32", "bf16", "fp16", "fp64"]


def precision_name(setting: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Return a precision setting with "auto" resolved: bf16 on CUDA where it has it, else fp16; fp32 on the CPU."""
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast_dtype(setting: Precision | Literal["auto"], device: torch.device) -> torch.dtype | None:
    """Return the autocast type of a precision setting on a device, None for plain fp32 and fp64."""
    return {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision_name(setting, device)]


def clock(device: torch.device) -> float:
    """Return the time in seconds once all work given to a device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Return the bytes in use at most so far: of the allocator, or, on the CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def keep_memory(device: torch.device) -> None:
    """Let freed memory stay with the process: work on a CPU goes through the same big tensors again and again.

    As it is set, glibc hands each back to the system and gets it again page by page, zeroed: 5 % of a training step. Other
    systems' C libraries and GPUs (torch keeps their memory) are left alone.
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)  # keeps what other threads have freed: no less than one of their heaps


def device_name(device: torch.device) -> str:
    """Return a device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"
