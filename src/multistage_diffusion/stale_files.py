"""Temporary names of what is being written, and the removal of what killed processes have left under them."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

WRITING, REPLACED = "writing", "replaced"
# .NAME.writing-1a2b3c4d: the new NAME; .NAME.replaced-1a2b3c4d: the old NAME until the new one is in place
OURS = re.compile(rf"\.(?P<name>.+)\.(?P<what>{WRITING}|{REPLACED})-[0-9a-f]{{8}}")


def sweep(folder: Path) -> None:
    """Remove what killed processes have left in a folder: our temporary names that no process has locked.

    A replaced folder whose successor never arrived gets its name back.
    """
    with suppress(OSError):
        found = [(entry.name, match) for entry in os.scandir(folder) if (match := OURS.fullmatch(entry.name))]
        for name, match in found:
            with suppress(OSError):
                _sweep(folder / name, folder / match["name"] if match["what"] == REPLACED else None)


def _sweep(left: Path, home: Path | None) -> None:
    handle = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if home is not None and not home.exists():
            os.rename(left, home)
        elif left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink()
    finally:
        os.close(handle)


def temporary_name(path: Path, what: str = WRITING) -> Path:
    """Return a new name beside a path: of its successor while it is written (WRITING), or of the old one (REPLACED)."""
    name = os.fsdecode(os.fsencode(path.name)[:200]) if what == WRITING else path.name  # 255 bytes at most
    return path.with_name(f".{name}.{what}-{secrets.token_hex(4)}")


def aside_name(path: Path) -> Path:
    """Return a free name beside a path for what is moved aside for good: with the time, and a number if that is taken."""
    stamp = f"{path.name}.{REPLACED}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = (path.with_name(stamp if number == 1 else f"{stamp}-{number}") for number in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Lock a folder, so that no other process takes it for a leftover; the lock follows its inode through renames."""
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        lock_own(handle)
        if not os.fstat(handle).st_nlink:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
        yield
    finally:
        os.close(handle)


def lock_own(handle: int) -> None:
    """Lock a file or folder of this process; only a sweep, which is short, may hold it before."""
    with suppress(OSError):  # a file system without locks: sweep leaves everything there
        fcntl.flock(handle, fcntl.LOCK_EX)
