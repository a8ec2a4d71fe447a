"""Consent to TorchScript files, which are code: a configuration's file runs only after the user has named it."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from ..config.serialization import read_lines
from ..errors import UserError
from ..files import append_line, cache_folder, make_folder

SCRIPTS = (".pt", ".pth", ".ts")
_here: set[str] = set()  # digests of the files named in this process


def is_script(name: str) -> bool:
    """Return whether features of this name are a TorchScript file."""
    return Path(name).suffix.lower() in SCRIPTS


def agree(name: str) -> None:
    """Record that the user has named a TorchScript file, so that a run's configuration may name it, too.

    The SHA-256 is stored in $MSDIFF_CACHE/agreed.jsonl, by default ~/.cache/multistage-diffusion/agreed.jsonl. Other
    names and unreadable files are ignored.
    """
    file = Path(name).expanduser()
    if not is_script(name) or not file.is_file():  # reading a FIFO would block
        return
    with suppress(OSError):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if not agreed(digest):
            _here.add(digest)
            with suppress(UserError):  # if it cannot be stored, it still holds for this process
                make_folder(_file().parent)
                append_line(_file(), {"sha256": digest, "file": str(file.resolve())})


def agreed(digest: str) -> bool:
    """Return whether the user has named the file of this SHA-256 on this machine."""
    return digest in _here or any(isinstance(r, dict) and r.get("sha256") == digest for r in read_lines(_file()))


def _file() -> Path:
    return cache_folder("agreed.jsonl")
