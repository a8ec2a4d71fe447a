import struct
import tracemalloc
import zipfile

import pytest

from multistage_diffusion.data.bounded import read_member, require_inflatable
from multistage_diffusion.errors import UserError


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_is_read_up_to_the_limit(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        archive.writestr("zeros", bytes(100_000))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        (member,) = archive.infolist()
        assert read_member(archive, member, 100_000) == bytes(100_000)
        with pytest.raises(UserError, match="it holds 100000 bytes, more than the 99999"):
            read_member(archive, member, 99_999)


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_without_a_bound_is_refused(tmp_path, compression):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", compression) as archive:
        archive.writestr("a", b"1")
    with (
        zipfile.ZipFile(tmp_path / "a.zip") as archive,
        pytest.raises(UserError, match=f"compressed by method {compression}; make the archive again with deflate"),
    ):
        read_member(archive, archive.infolist()[0], 10)


def test_a_member_that_is_longer_than_it_says_takes_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros", bytes(20_000_000))
    data = bytearray((tmp_path / "a.zip").read_bytes())
    for start in (22, data.rindex(b"PK\x01\x02") + 24):
        struct.pack_into("<I", data, start, 10)
    (tmp_path / "a.zip").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        tracemalloc.start()
        with pytest.raises(zipfile.BadZipFile):
            read_member(archive, archive.infolist()[0], 1000)
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.stop()


def test_deflate_has_a_largest_factor():
    require_inflatable(1032 * 10_000, 10_000)
    with pytest.raises(UserError, match="claims 20000000 bytes, more than its 10000"):
        require_inflatable(20_000_000, 10_000)
