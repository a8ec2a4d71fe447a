"""Archives and compressed files of unknown origin: never more than a stated number of bytes."""

from __future__ import annotations

import zipfile

from ..errors import UserError
from ..reading import require_length

FILE_LIMIT = 1 << 30  # bytes of one image file
LISTING_LIMIT = 1 << 28  # bytes of a dataset.json: more than ImageNet's, with its 1.3 million names, ten times over

_MOST_INFLATED = 1040  # deflate writes at least 2 bits for 258 bytes, a factor of 1032


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
    require_length(member.file_size, limit)
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
