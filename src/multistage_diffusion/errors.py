"""Errors that a user can fix; any other exception is a bug of this package."""

from __future__ import annotations

import errno
import sys
from pathlib import Path

_PACKAGE = str(Path(__file__).parent)
_MENDS = {
    errno.ENOENT: "check the name",
    errno.EACCES: "check its permissions, or choose another place",
    errno.EPERM: "check its permissions, or choose another place",
    errno.EROFS: "choose a place that can be written",
    errno.EISDIR: "name a file instead",
    errno.ENOTDIR: "choose another name",
    errno.EEXIST: "choose another name",
    errno.ENOTEMPTY: "choose another name",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "mend the links",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "choose another file system",
    errno.EIO: "check the disk",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "raise the limit of open files",
    errno.ENOMEM: "close other programs, or use a machine with more memory",
    errno.EBUSY: "try again later",
    errno.ETXTBSY: "try again later",
}
# errors of the machine, not of the file at which they occurred
_MACHINE = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
}
_CPU_ALLOCATOR = ("can't allocate memory", "not enough memory: you tried to allocate")
_MEMORY_MEND = "take a smaller batch, count or network, or a machine with more memory"


class UserError(ValueError):
    """An error that a user can fix: the message names the field or file, the value and the fix, in one line.

    The command line prints the message and exits with code 2. Any other exception is a bug and shows its traceback.
    """


class NotFiniteError(UserError, FloatingPointError):
    """A value is not finite because of unsuitable settings, weights or data; the message names the place."""


def require(condition: bool, message: str) -> None:
    """Raise UserError(message) unless a condition on a user's value holds."""
    if not condition:
        raise UserError(message)


def require_size(name: str, size: tuple[int, int] | None) -> None:
    """Raise UserError unless a user's (height, width) is positive; None is not given."""
    if size is not None:
        height, width = size
        require(min(height, width) > 0, f"{name}={height}x{width}: height and width must be positive")


def explained(error: BaseException) -> str | None:
    """Return the one-line message for an error that the user can fix; None for a bug.

    Such errors are UserError, errors of files, devices and connections, and out-of-memory errors.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return _explained_system(error)
    if isinstance(error, MemoryError):
        return f"memory ran out ({str(error) or 'no details'}); {_MEMORY_MEND}"
    if isinstance(error, RuntimeError) and out_of_memory(error):
        return f"memory ran out ({str(error).splitlines()[0]}); {_MEMORY_MEND}"
    return None


def out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error is torch's out-of-memory error, on a GPU or on the CPU."""
    torch = sys.modules.get("torch")  # a torch error implies that torch is imported
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return any(words in str(error) for words in _CPU_ALLOCATOR)


def _explained_system(error: OSError) -> str | None:
    if isinstance(error, ConnectionError | TimeoutError) and not isinstance(error, BrokenPipeError):
        return error.strerror or str(error) or type(error).__name__
    if error.errno is None or isinstance(error, BrokenPipeError):
        return None
    reason = error.strerror or str(error)
    mend = f"; {_MENDS[error.errno]}" if error.errno in _MENDS else ""
    if error.filename is None:
        return f"{reason}{mend}" if error.errno in _MACHINE else None
    name = error.filename.decode(errors="replace") if isinstance(error.filename, bytes) else str(error.filename)
    if name.startswith(_PACKAGE) and error.errno == errno.ENOENT:
        return None  # a file of this package is missing: a bug, not a name that the user gave
    return f"{name}: {reason}{mend}"
