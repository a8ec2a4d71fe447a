"""Checks, before the work starts, that its result can be written at a path."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def require_place(path: Path) -> None:
    """Check, before the work starts, that a path can be written.

    Raises:
        UserError: if not.
    """
    if path.name in ("", ".."):
        raise UserError(f"--out {path}: names no file or folder of its own; give one")
    if path.is_symlink() and not path.exists():
        raise UserError(f"--out {path}: is a link that leads nowhere; remove it, or choose another name")
    above = next(p for p in path.absolute().parents if os.path.lexists(p))
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UserError(f"--out {path}: nothing can be written in {above}; choose another place")


def require_utf8(path: Path) -> None:
    """Refuse a folder of tensors whose path safetensors cannot open.

    Raises:
        UserError: if the absolute path is not valid UTF-8.
    """
    try:
        str(path.absolute()).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{path}: its path is not valid UTF-8, which files of tensors need; choose another name"
        ) from None


def require_room(path: Path, go_on: str, *, replace: bool, ignored: str = "") -> bool:
    """Check before the work starts that a folder can be created; return whether one there must be moved aside first.

    Args:
        path: the folder.
        go_on: how to continue with an existing one, for the message.
        replace: whether what is there may be moved aside.
        ignored: name of a file that does not count as content.

    Raises:
        UserError: if what is there may not be replaced, or nothing can be written there.
    """
    require_utf8(path)
    require_place(path)
    taken = path.exists() and (not path.is_dir() or any(p.name != ignored for p in path.iterdir()))
    if taken and not replace:
        raise UserError(
            f"{path}: exists; {go_on}, choose another --out, or replace it (--replace; replace=True in Python)"
        )
    if taken and path.is_symlink():
        raise UserError(f"{path}: is a link; name what it leads to, {path.resolve()}, to replace that")
    return taken
