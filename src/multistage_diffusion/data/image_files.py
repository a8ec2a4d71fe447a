"""Image files of a data set, read by number, and what shows that they have not changed."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import UserError

FileTimes = tuple[int, int, int]  # length in bytes; when content and attributes were last changed, in nanoseconds


def require_unchanged(before: FileTimes, now: FileTimes) -> None:
    """Refuse a file that has changed.

    Raises:
        UserError: the reason why it is refused; the caller names the file.
    """
    if before != now:
        raise UserError("it has changed since the data set was opened")


def read_unchanged(path: str, before: FileTimes, start: int = 0, size: int | None = None) -> bytes:
    """Return a part of a file, by default all, that is as it was when the data set was opened.

    Raises:
        UserError: the reason why it cannot be read; the caller names the file.
    """
    try:
        # O_NONBLOCK: a named pipe may have replaced the file
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                raise UserError("it is no longer a file")
            require_unchanged(before, file_times(found))
            wanted = before[0] if size is None else size
            content = os.pread(handle, wanted, start)
            while len(content) < wanted and (more := os.pread(handle, wanted - len(content), start + len(content))):
                content += more
        finally:
            os.close(handle)
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    if len(content) < wanted:
        raise UserError("it is cut short")
    return content


@dataclass(frozen=True)
class Stamps:
    """What changes when a file of a data set changes.

    Attributes:
        place: what tells the data set from others: its absolute path, or its name.
        digest: SHA-256, in hex, of the names, lengths and times of all files.
        newest: the latest of the times, in nanoseconds since 1970.
    """

    place: str
    digest: str
    newest: int

    @classmethod
    def of(cls, place: str, files: Iterable[tuple[str, FileTimes]]) -> Stamps:
        """Return the stamps of files with their names, in an order that depends on the names only."""
        digest, newest = hashlib.sha256(), 0
        for name, times in files:
            digest.update(f"{name!r} {times}\n".encode("utf-8", "surrogateescape"))
            newest = max(newest, times[1], times[2])
        return cls(place, digest.hexdigest(), newest)


def file_times(found: os.stat_result) -> FileTimes:
    """Return the length and the times of a file."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


@dataclass(frozen=True)
class ImageFiles:
    """Image files of a data set.

    Attributes:
        source: the data set; starts every error message.
        names: name of each file in messages.
        read: returns the bytes of the file with a given number; called from several threads. It raises an error for a file
            that has changed since the data set was opened.
        stamps: of all files; None: not known, so nothing about them is kept for the next opening.
    """

    source: str
    names: Sequence[str]
    read: Callable[[int], bytes]
    stamps: Stamps | None = None
