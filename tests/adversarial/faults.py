"""Faults at every point where a command changes the disk: the process dies there, or the disk is full there."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# what changes a folder or a file, or makes a change last
_CALLS = (
    "open",
    "write",
    "replace",
    "rename",
    "fsync",
    "mkdir",
    "unlink",
    "rmdir",
    "ftruncate",
    "fchmod",
    "link",
    "symlink",
)


class Killed(BaseException):
    """The process died: nothing that follows reaches the disk."""


class Faults:
    """Counts the points at which the disk is changed, and lets one of them fail.

    Args:
        at: number of the point that fails, from 0; None: none does.
        full: the disk is full there, for one call; else the process dies there.
        really: this process is ended by SIGKILL instead of an exception.
    """

    def __init__(self, at: int | None = None, *, full: bool = False, really: bool = False) -> None:
        self.at, self.full, self.really, self.points = at, full, really, 0
        self.struck = False
        self._real: dict[str, Callable[..., Any]] = {}

    @contextmanager
    def active(self) -> Iterator[Faults]:
        """Let the functions of `os` fail while the block runs."""
        self._real = {name: getattr(os, name) for name in _CALLS}
        for name in _CALLS:
            setattr(os, name, self._guarded(name))
        try:
            yield self
        finally:
            for name, real in self._real.items():
                setattr(os, name, real)

    def _guarded(self, name: str) -> Callable[..., Any]:
        real = self._real[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            if not _changes(name, args):
                return real(*args, **kwargs)
            if self.struck and not self.full:
                raise Killed  # the process is dead: its clean-up does not happen either
            point, self.points = self.points, self.points + 1
            if point != self.at:
                return real(*args, **kwargs)
            self.struck = True
            if name == "write":
                real(args[0], args[1][: len(args[1]) // 2])  # torn
            if self.really:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise Killed

        return call


def _changes(name: str, args: tuple[Any, ...]) -> bool:
    if name == "open":
        return bool(args[1] & (os.O_CREAT | os.O_TRUNC)) and args[0] != os.devnull
    if name in ("write", "fsync"):
        return isinstance(args[0], int) and args[0] > 2
    return True
