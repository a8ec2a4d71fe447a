"""All writing to disk: a file or folder is either complete or unchanged, however the process is stopped.

Nothing is written through a link. New files follow the user's umask. The next command that writes to the same folder
removes what a killed process has left. A disk error names the file and the fix.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError
from .stale_files import OURS, REPLACED, aside_name, held, lock_own, sweep, temporary_name

_OPEN = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: opening a FIFO does not block

_FULL = "free some space, or choose another place"
_SHUT = "choose another place, or ask its owner for the right to write there"
_MENDS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EACCES: _SHUT,
    errno.EPERM: _SHUT,
    errno.EROFS: _SHUT,
    errno.ELOOP: "a link is at its place; remove the link",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "choose another name",
}


class NotWrittenError(UserError, OSError):
    """A file cannot be written: the disk is full or read-only, or the place belongs to another user."""

    def __init__(self, message: str, error: OSError) -> None:
        super().__init__(message)
        self.errno, self.strerror = error.errno, error.strerror

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple[Any, ...]:  # to send it to other processes
        return type(self), (str(self), OSError(self.errno, self.strerror))


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a disk error into one line that names the file and the fix.

    Raises:
        NotWrittenError: in place of any OSError of the block.
    """
    try:
        yield
    except NotWrittenError:
        raise
    except OSError as error:
        mend = _MENDS.get(error.errno or 0, "choose another place")
        parts = [match["name"] if (match := OURS.fullmatch(part)) else part for part in path.parts]
        raise NotWrittenError(
            f"{Path(*parts)}: cannot be written ({error.strerror or error}); {mend}", error
        ) from error


def to_dict(value: Any) -> Any:
    """Return value as JSON-compatible data; a schedule or prior includes its `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = getattr(value, "kind", None)
        return {"kind": kind, **data} if isinstance(kind, str) else data
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def cache_folder(kind: str) -> Path:
    """Return the folder for results of one kind that can be made again.

    It is $MSDIFF_CACHE/KIND, else $XDG_CACHE_HOME/multistage-diffusion/KIND, else ~/.cache/multistage-diffusion/KIND.
    """
    above = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "multistage-diffusion"
    return Path(os.environ.get("MSDIFF_CACHE") or above).expanduser() / kind


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents so that they survive a power cut.

    Raises:
        UserError: if it cannot be created.
    """
    with disk_errors(path):
        missing = [p for p in (path, *path.parents) if not p.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for made in missing:
            sync_folder(made.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder (or file) to disk, so that renames in the folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either complete or unchanged: temporary name, fsync, rename.

    A link at the path is replaced; its target stays unchanged. A replaced file keeps its mode.

    Raises:
        UserError: if it cannot be written, or the path is something other than a file.
    """
    with new_file(path, overwrite=True) as file:
        file.write(data)


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Write a large file in parts so that it is either complete or unchanged: temporary name, fsync, rename.

    Args:
        path: the file.
        overwrite: replace an existing file, which keeps its mode.

    Yields:
        The file under its temporary name, opened for writing; after an error or Ctrl-C it is removed.

    Raises:
        UserError: if it cannot be written, exists, or is something other than a file.
    """
    refuse_special(path)
    make_folder(path.parent)
    sweep(path.parent)
    temporary = temporary_name(path)
    try:
        with disk_errors(path), os.fdopen(_new_file(temporary), "w+b") as file:
            mode = _mode(path)
            if mode is not None:
                os.fchmod(file.fileno(), mode)
            yield file
            file.flush()
            os.fsync(file.fileno())
            if os.path.lexists(path) and not overwrite:
                raise UserError(f"{path}: exists; choose another name")
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Write a new file into a folder that `new_folder` is building.

    Raises:
        UserError: if it cannot be written.
    """
    with disk_errors(path), os.fdopen(_new_file(path), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _new_file(path: Path) -> int:
    """Return the descriptor of a new, locked file."""
    while True:
        handle = os.open(path, os.O_WRONLY | os.O_EXCL | _OPEN, 0o666)
        lock_own(handle)
        if os.fstat(handle).st_nlink:
            return handle
        os.close(handle)  # another process's sweep removed the file before it was locked


def _mode(path: Path) -> int | None:
    """Return the mode of a regular file that will be replaced; None if there is none."""
    with suppress(FileNotFoundError):
        found = path.lstat()
        return stat.S_IMODE(found.st_mode) if stat.S_ISREG(found.st_mode) else None
    return None


def refuse_special(path: Path) -> None:
    """Refuse to write to a path that is something other than a file.

    Raises:
        UserError: for a folder, a device, a pipe or a socket, or a link to one.
    """
    with suppress(OSError):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise UserError(f"{path}: is a folder; name a file")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path}: is a device, pipe or socket; name a file")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically.

    Raises:
        UserError: for a NaN or an infinity, which JSON lacks, naming its key. Nothing is written then.
    """
    write_atomic(path, json_bytes(path, value))


def json_bytes(path: Path, value: Any) -> bytes:
    """Return a value as the JSON bytes of a file.

    Raises:
        UserError: for a NaN or an infinity, naming its key.
    """
    data = to_dict(value)
    _require_finite(data, path)
    return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()


def _require_finite(data: Any, path: Path, where: str = "") -> None:
    if isinstance(data, float) and not math.isfinite(data):
        raise UserError(f"{path}: {where}={data} cannot be written as JSON; use null")
    children = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in children:
        _require_finite(value, path, f"{where}.{key}" if where else str(key))


def append_line(path: Path, record: Any) -> None:
    """Append one JSON object as a line: completely or, after an error, not at all.

    Raises:
        UserError: if it cannot be written, or the path is a link or something other than a file.
    """
    line = (json.dumps(to_dict(record)) + "\n").encode()
    with disk_errors(path), _opened(path, os.O_WRONLY | os.O_APPEND) as handle:
        size = os.fstat(handle).st_size
        try:
            written = 0
            while written < len(line):
                written += os.write(handle, line[written:])
            os.fsync(handle)
            if size == 0:
                sync_folder(path.parent)
        except BaseException:
            with suppress(OSError):
                os.ftruncate(handle, size)
            raise


@contextmanager
def locked(path: Path, busy: str) -> Iterator[None]:
    """Hold a lock file, which is created if missing and never written.

    Args:
        path: the lock file.
        busy: the error message if another process holds it.

    Raises:
        UserError: with `busy`; or if the file cannot be opened, or is a link or something other than a file.
    """
    with ExitStack() as stack:
        with disk_errors(path):
            handle = stack.enter_context(_opened(path, os.O_RDWR))
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(busy) from None
        yield


@contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    """Open a regular file, created if missing, without truncating it or following a link."""
    handle = os.open(path, flags | _OPEN, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise UserError(f"{path}: is a device, pipe or socket, where a file belongs; remove it")
        yield handle
    finally:
        os.close(handle)


def move_aside(path: Path) -> None:
    """Rename a file or folder to PATH.replaced-TIME, or to PATH.replaced-TIME-2, ... if that exists.

    Raises:
        UserError: if that fails.
    """
    with disk_errors(path):
        path.rename(aside_name(path))


@contextmanager
def new_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Create a folder that appears with all its content at once: temporary name, fsync, rename.

    Args:
        path: the final place: missing or an empty folder, unless `replace`.
        replace: replace an existing folder, which is removed only after the new one is in place.

    Yields:
        The folder under its temporary name, beside its final place; the block fills it. After an error it is removed.

    Raises:
        UserError: if it cannot be written, or the path exists.
    """
    path = _led_to(path)
    make_folder(path.parent)
    sweep(path.parent)
    with _new_held_folder(path) as temporary:
        try:
            yield temporary
            with disk_errors(path):
                _sync_tree(temporary)
                if replace and path.exists():
                    _exchange(temporary, path)
                else:
                    _rename_new(temporary, path)
                sync_folder(path.parent)
        except BaseException:
            remove_folder(temporary)
            raise


def _led_to(path: Path) -> Path:
    """Return what a link leads to; any other path as it is."""
    if not path.is_symlink():
        return path
    try:
        return path.resolve()
    except (RuntimeError, OSError):  # the former until Python 3.13
        raise UserError(f"{path}: is a link that leads to itself; remove it, or choose another name") from None


@contextmanager
def _new_held_folder(path: Path) -> Iterator[Path]:
    """Create the temporary folder for a path, and lock it."""
    with ExitStack() as stack:
        while True:
            temporary = temporary_name(path)
            with disk_errors(path):
                temporary.mkdir()
            with suppress(FileNotFoundError):  # another process's sweep removed the folder before it was locked
                stack.enter_context(held(temporary))
                break
        yield temporary


def _rename_new(temporary: Path, path: Path) -> None:
    try:
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UserError(f"{path}: exists; choose another place") from None
        raise


def _exchange(temporary: Path, path: Path) -> None:
    """Replace one folder by another; if the process is killed between the renames, `sweep` restores the old one."""
    old = temporary_name(path, REPLACED)
    with held(path):
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except BaseException:
            os.rename(old, path)
            raise
        sync_folder(path.parent)
        remove_folder(old)


def remove_folder(path: Path) -> None:
    """Remove a folder and its content; it is renamed first, so a half-removed folder never looks complete."""
    if not OURS.fullmatch(path.name):
        with disk_errors(path):
            doomed = temporary_name(path)
            os.rename(path, doomed)
        path = doomed
    shutil.rmtree(path, ignore_errors=True)


def _sync_tree(folder: Path) -> None:
    """Flush a folder, its subfolders and their files to disk, so that they survive a power cut."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync_folder(Path(root, name))
        sync_folder(Path(root))
