"""Files of latents in the cache: written part by part, checked when they are opened, and read by index.

A file is a safetensors file with one float32 tensor, "latents" (N, c, h, w), and the SHA-256 digest of its bytes as metadata.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..data.rows import FileRows, Rows, as_rows
from ..files import new_file

FLOAT32 = np.dtype("<f4")
_NO_DIGEST = "0" * 64  # until all is written


def write_latents(path: Path, shape: tuple[int, int, int, int], encode: Callable[[], Iterable[Tensor]]) -> Rows:
    """Write latents as they are encoded, and return them as rows of the file.

    If the file cannot be written, they are encoded into memory, with a warning: they can be made again.

    Args:
        path: the file.
        shape: (N, c, h, w).
        encode: makes the latents, in parts (n, c, h, w), of which all together are N.
    """
    header, digest = _header(shape), hashlib.sha256()
    try:
        with new_file(path, overwrite=True) as file:
            if hasattr(os, "posix_fallocate"):  # a full disk is told now; not on every system
                os.posix_fallocate(file.fileno(), 0, len(header) + math.prod(shape) * FLOAT32.itemsize)
            file.write(header)
            for part in encode():
                values = part.contiguous().numpy().astype(FLOAT32, copy=False).reshape(-1).data.cast("B")
                digest.update(values)
                file.write(values)
            file.seek(header.index(_NO_DIGEST.encode()))
            file.write(digest.hexdigest().encode())
        return FileRows(path, len(header), shape[0], shape[1:], dtype=FLOAT32)
    except OSError as error:
        warnings.warn(
            f"{path}: latents cannot be kept ({error.strerror or error}) and will be made again; set MSDIFF_CACHE to a "
            "folder with room",
            stacklevel=3,
        )
    return as_rows(torch.cat(list(encode())))


def _header(shape: tuple[int, ...]) -> bytes:
    """Return what stands before the values in a safetensors file: the length of a JSON text, and that text."""
    tensor = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, math.prod(shape) * FLOAT32.itemsize]}
    text = json.dumps({"__metadata__": {"sha256": _NO_DIGEST}, "latents": tensor}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_latents(path: Path, shape: tuple[int, int, int, int]) -> Rows | None:
    """Return the latents of a file as rows of the file; None if it is missing or, with a warning, damaged.

    Args:
        path: the file.
        shape: (N, c, h, w), as they must be.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            latents = file.get_slice("latents")
            same = (latents.get_dtype(), tuple(latents.get_shape())) == ("F32", shape)
            told = (file.metadata() or {}).get("sha256")
        with path.open("rb") as data:
            start = 8 + int.from_bytes(data.read(8), "little")
            data.seek(start)
            if same and told == hashlib.file_digest(data, "sha256").hexdigest():
                return FileRows(path, start, shape[0], shape[1:], dtype=FLOAT32)
        fault = "its content is not what was written"
    except (SafetensorError, OSError) as error:
        fault = str(error)
    warnings.warn(f"{path}: damaged ({fault}); its latents are made again", stacklevel=3)
    return None
