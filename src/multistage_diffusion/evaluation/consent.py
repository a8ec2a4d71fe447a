"""TorchScript files are code: one that a configuration names runs only after the user has named it on this machine."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from pathlib import Path

from ..config.serialization import read_lines
from ..errors import UserError
from ..files import append_line, make_folder

SCRIPTS = (".pt", ".pth", ".ts")
_here: set[str] = set()  # digests that this process was told of


def is_script(name: str) -> bool:
    """Return whether features of this name are a TorchScript file."""
    return Path(name).suffix.lower() in SCRIPTS


def agree(name: str) -> None:
    """Remember that the user has named a TorchScript file: from now on a run's configuration may name it, too.

    The digest is kept in $MSDIFF_CACHE/agreed.jsonl, by default ~/.cache/multistage-diffusion/agreed.jsonl. Another name, or
    a file that cannot be read, is passed over.
    """
    file = Path(name).expanduser()
    if not is_script(name) or not file.is_file():  # a FIFO would be waited for
        return
    with suppress(OSError):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if not agreed(digest):
            _here.add(digest)
            with suppress(UserError):  # nowhere to remember it: this process knows it
                make_folder(_file().parent)
                append_line(_file(), {"sha256": digest, "file": str(file.resolve())})


def agreed(digest: str) -> bool:
    """Return whether the user has named the file of this SHA-256 on this machine."""
    return digest in _here or any(isinstance(r, dict) and r.get("sha256") == digest for r in read_lines(_file()))


def _file() -> Path:
    return Path(os.environ.get("MSDIFF_CACHE") or "~/.cache/multistage-diffusion").expanduser() / "agreed.jsonl"
