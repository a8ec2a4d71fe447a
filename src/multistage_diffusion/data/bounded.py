"""Reading files of unknown origin: regular files only, and never more than a stated number of bytes."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path

from ..errors import UserError

FILE_LIMIT = 1 << 30  # bytes of one image file
LISTING_LIMIT = 1 << 28  # bytes of a dataset.json: more than ImageNet's, with its 1.3 million names, ten times over

_MOST_INFLATED = 1040  # deflate writes at least 2 bits for 258 bytes, a factor of 1032
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: Path) -> int:
    """Return the length in bytes of a regular file; nothing is opened.

    Raises:
        UserError: what is there instead, or why it cannot be told; the caller names the file.
    """
    try:
        found = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(getattr(error, "strerror", None) or str(error)) from None
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"it is {_KINDS.get(kind, 'something else')}, not a file")
    return found.st_size


def read_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        UserError: why it cannot be read; the caller names the file.
    """
    _require_length(require_regular(path), limit)
    # without waiting: a named pipe may have taken the file's place since
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        with open(os.open(path, flags), "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    _require_length(len(content), limit)  # some files grow, and those of /proc have no length
    return content


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """Return the content of a member of a zip file, of at most `limit` bytes.

    Raises:
        UserError: why it cannot be read; the caller names archive and member.
    """
    if member.flag_bits & 1:
        raise UserError("it is encrypted; unpack the archive with its password and give the folder")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # a few hundred bytes of bzip2 become a gigabyte, which zipfile unpacks before it heeds the length it is told
        raise UserError(
            f"it is compressed by method {member.compress_type}, not deflate; make the archive again without"
        )
    _require_length(member.file_size, limit)
    content = bytearray()
    with archive.open(member) as file:
        while piece := file.read(1 << 20):  # in one go, zipfile would unpack all there is, whatever length is claimed
            content += piece
    return bytes(content)


def require_inflatable(claimed: int, compressed: int) -> None:
    """See, before memory is taken, that deflated bytes can become as many as are claimed.

    Raises:
        UserError: if they cannot.
    """
    if claimed > _MOST_INFLATED * compressed + 1024:
        raise UserError(f"it claims to hold {claimed} bytes, more than its {compressed} compressed bytes can become")


def _require_length(length: int, limit: int) -> None:
    if length > limit:
        raise UserError(f"it holds {length} bytes, more than the {limit} that are read")
