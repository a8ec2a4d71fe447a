"""Checksums of torch's archives: torch itself reads weights without a look at them."""

from __future__ import annotations

import zipfile
from pathlib import Path

from .errors import UserError

_ZIP = b"PK\x03\x04"
_PIECE = 1 << 20  # bytes read at once, however large an entry is


def require_intact(path: Path) -> None:
    """Check the CRC-32 of every entry of a file of torch.save, which is a zip archive.

    Files of the old format, and those written with `torch.serialization.set_crc32_options(False)`, have none, and pass.
    Another kind of file passes, too.

    Raises:
        UserError: in one line, naming file and entry: a byte of it was changed, or the archive cannot be read.
        OSError: if the file cannot be opened.
    """
    with path.open("rb") as file:
        if file.read(len(_ZIP)) != _ZIP:
            return
    entry = ""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if not any(member.CRC for member in members):
                return
            if sum(member.compress_size for member in members) > path.stat().st_size:
                raise zipfile.BadZipFile("its entries overlap")  # they would be read again and again
            for member in members:
                entry = f"entry {member.filename}: "
                _read(archive, member)
    except Exception as error:  # zipfile raises many exception types on broken files
        reason = " ".join(f"{entry}{error or type(error).__name__}".split())[:160]
        raise UserError(f"{path}: is truncated or damaged ({reason}); download or copy it again") from None


def _read(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Read an entry to its end, where zipfile compares the checksum."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        # a few hundred bytes of bzip2 can become a gigabyte
        raise zipfile.BadZipFile(f"compressed by method {member.compress_type}, which torch does not write")
    with archive.open(member) as file:
        while file.read(_PIECE):
            pass
