"""Checksums of torch's archives: every changed byte of an entry is found, whole files pass."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

import pytest
import torch

from multistage_diffusion.archives import require_intact
from multistage_diffusion.errors import UserError


def saved(path: Path, **options: bool) -> Path:
    torch.save({"w": torch.arange(3000.0), "v": torch.ones(2)}, path, **options)  # type: ignore[arg-type]
    return path


def start_of(path: Path, member: zipfile.ZipInfo) -> int:
    """Where the content of an entry begins in an archive."""
    content, place = path.read_bytes(), member.header_offset
    names = struct.unpack("<HH", content[place + 26 : place + 30])
    return place + 30 + sum(names)


def flipped(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


def entries(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return archive.infolist()


def test_a_flipped_bit_in_any_entry_is_found(tmp_path: Path) -> None:
    whole = saved(tmp_path / "whole.bin")
    require_intact(whole)
    members = entries(whole)
    assert len(members) >= 5
    for member in members:
        path = tmp_path / "damaged.bin"
        for offset in {0, member.file_size // 2, member.file_size - 1}:
            path.write_bytes(whole.read_bytes())
            flipped(path, start_of(path, member) + offset)
            with pytest.raises(UserError, match="is truncated or damaged") as caught:
                require_intact(path)
            text = str(caught.value)
            assert text.startswith(f"{path}: ")
            assert f"entry {member.filename}: Bad CRC-32" in text
            assert "\n" not in text


def test_torch_alone_does_not_see_it(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.bin")
    flipped(path, start_of(path, next(m for m in entries(path) if m.file_size == 12000)) + 4001)
    assert not torch.equal(torch.load(path, weights_only=True)["w"], torch.arange(3000.0))


def test_files_without_checksums_pass(tmp_path: Path) -> None:
    require_intact(saved(tmp_path / "old.bin", _use_new_zipfile_serialization=False))
    (tmp_path / "other").write_bytes(b"PK, but no archive")
    require_intact(tmp_path / "other")
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "unchecked.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    assert not any(member.CRC for member in entries(path))
    require_intact(path)


def test_archives_that_torch_does_not_write_are_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data/0", bytes(1 << 22))
    require_intact(tmp_path / "deflated.pt")
    with zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a/data/0", bytes(1 << 22))
    with pytest.raises(UserError, match="entry a/data/0: compressed by method 12"):
        require_intact(tmp_path / "packed.pt")


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "many.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", bytes(1000))
        archive.filelist += archive.filelist * 99  # a directory of 100 entries with the bytes of one
    with pytest.raises(UserError, match="its entries overlap"):
        require_intact(path)


@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_truncated_archive_is_one_line(share: float, tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"w\.pt: is truncated or damaged \(File is not a zip file\)"):
        require_intact(path)
