"""Image files of a data set, read by number, and what shows that they have not changed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ..errors import UserError

FileTimes = tuple[int, int, int]  # length in bytes; when content and attributes were last changed, in nanoseconds


def require_unchanged(before: FileTimes | None, now: FileTimes | None) -> None:
    """Refuse a file that has changed.

    Raises:
        UserError: the reason why it is refused; the caller names the file.
    """
    if before != now:
        raise UserError("it has changed since the data set was opened")


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
