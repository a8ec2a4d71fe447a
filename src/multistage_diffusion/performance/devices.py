"""Devices and precision of training and sampling."""

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
    """Join the processes of this job; return them and this process's device.

    With CUDA and no device index, each process gets the GPU of its LOCAL_RANK.

    Args:
        device: cpu, cuda, cuda:N; None: CUDA if available.
        command: the command that all processes run.

    Raises:
        UserError: if the device does not exist, the environment of the processes is incomplete, or their commands
            differ.
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
    """Return the requested device; for None or "auto", CUDA if available, else the CPU.

    Raises:
        UserError: if the device is unknown, not supported or not available.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is unknown; use cpu, cuda or cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):  # noise is drawn in float64, which other devices lack
        raise UserError(f"device={str(device)!r} is not supported; use cpu, cuda or cuda:N")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={str(device)!r}: no CUDA device is available; use --device cpu")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"device={str(device)!r}: there are {torch.cuda.device_count()} CUDA devices; use a lower number"
        )
    return resolved


# from malloc.h
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4

Precision = Literal["fp32", "bf16", "fp16", "fp64"]


def precision_name(setting: Precision | Literal["auto"], device: torch.device) -> Precision:
    """Return the precision, with "auto" resolved: on CUDA bf16 if supported, else fp16; on the CPU fp32."""
    if setting != "auto":
        return setting
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def autocast_dtype(setting: Precision | Literal["auto"], device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype of a precision setting on a device; None for fp32 and fp64."""
    return {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision_name(setting, device)]


def clock(device: torch.device) -> float:
    """Return the time in seconds after synchronising the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Return the peak memory so far in bytes: of the CUDA allocator, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def keep_memory(device: torch.device) -> None:
    """Make the process keep freed memory, because CPU computation allocates the same large tensors repeatedly.

    By default glibc returns large blocks to the system and gets them back page by page, zeroed. This takes 5 % of a
    training step. The function does nothing for other operating systems and for GPUs (torch caches GPU memory).
    """
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_TOP_PAD, 2**26)  # keeps memory freed by other threads; at least one of their heaps


def device_name(device: torch.device) -> str:
    """Return a description of a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"
