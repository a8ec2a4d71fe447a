"""Limits on the bytes read from archives and compressed files of unknown origin."""

from __future__ import annotations

import zipfile

from ..errors import UserError
from ..reading import require_length

FILE_LIMIT = 1 << 30  # bytes of one image file
LISTING_LIMIT = 1 << 28  # bytes of a dataset.json: more than ten times ImageNet's, with its 1.3 million names

_MOST_INFLATED = 1040  # deflate needs at least 2 bits for 258 bytes, a factor of 1032


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, limit: int) -> bytes:
    """Return the content of a zip member of at most `limit` bytes.

    Raises:
        UserError: the reason why it cannot be read; the caller adds the names of archive and member.
    """
    if member.flag_bits & 1:
        raise UserError("it is encrypted; unpack the archive with its password and give the folder")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # a few hundred bytes of bzip2 can become a gigabyte, which zipfile unpacks before it checks the stated length
        raise UserError(f"it is compressed by method {member.compress_type}; make the archive again with deflate")
    require_length(member.file_size, limit)
    content = bytearray()
    with archive.open(member) as file:
        while piece := file.read(1 << 20):  # one read() would unpack everything, whatever the stated length
            content += piece
    return bytes(content)


def require_inflatable(claimed: int, compressed: int) -> None:
    """Check, before memory is allocated, that the compressed bytes can inflate to the claimed length.

    Raises:
        UserError: if they cannot.
    """
    if claimed > _MOST_INFLATED * compressed + 1024:
        raise UserError(f"it claims {claimed} bytes, more than its {compressed} compressed bytes can become")
