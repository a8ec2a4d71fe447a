import gzip
import io
import tarfile
import tracemalloc

import numpy as np
import pytest

from multistage_diffusion.data.sources import cifar, open_data
from multistage_diffusion.errors import UserError

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cifar, "RECORDS", 4)


def records(batch):
    """Four records, byte by byte: label, then 1024 of red, of green, of blue."""
    out = b""
    for i in range(4):
        planes = [
            bytes((batch * 40 + i * 10 + plane * 3 + row) % 256 for row in range(32) for _ in range(32))
            for plane in range(3)
        ]
        out += bytes([(batch + i) % 10]) + b"".join(planes)
    return out


def files():
    batches = {f"data_batch_{n}.bin": records(n) for n in range(1, 6)}
    return {
        "batches.meta.txt": ("\n".join(NAMES) + "\n\n").encode(),
        **batches,
        "test_batch.bin": records(0),
        "readme.html": b"<html>",
    }


def unpack(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        (folder / name).write_bytes(data)
    return folder


def pack(path, content, folder="cifar-10-batches-bin/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in content.items():
            member = tarfile.TarInfo(folder + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        open_data(f"cifar10:{path}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("how", ["files", "folder", "archive", "dotted archive"])
def test_records_are_label_then_planes(tmp_path, small, how):
    if "archive" in how:
        content = dict(reversed(files().items()))  # in any order
        path = pack(
            tmp_path / "a.tar.gz", content, "./cifar-10-batches-bin/" if "dotted" in how else "cifar-10-batches-bin/"
        )
    else:
        path = unpack(tmp_path / "cifar-10-batches-bin", files())
        path = tmp_path if how == "folder" else path
    before = sorted(tmp_path.rglob("*"))
    data = open_data(f"cifar10:{path}")
    assert data.array().shape == (20, 3, 32, 32)
    assert data.labels.tolist() == [(batch + i) % 10 for batch in range(1, 6) for i in range(4)]
    assert data.class_names == NAMES
    expected = [
        [[[(batch * 40 + i * 10 + plane * 3 + row) % 256] * 32 for row in range(32)] for plane in range(3)]
        for batch in range(1, 6)
        for i in range(4)
    ]
    np.testing.assert_array_equal(data.array(), expected)
    assert data.name == f"cifar10:{path}"
    assert sorted(tmp_path.rglob("*")) == before


def test_the_published_length_is_read(tmp_path):
    folder = unpack(tmp_path / "bin", {"batches.meta.txt": "\n".join(NAMES).encode()})
    for n in range(1, 6):
        with (folder / f"data_batch_{n}.bin").open("wb") as file:
            file.truncate(30_730_000)  # all zeros, and no room on disk
    data = open_data(f"cifar10:{folder}")
    assert data.array().shape == (50_000, 3, 32, 32)
    assert not data.labels.any()


def test_missing_files_are_named_with_where_they_come_from(tmp_path, small):
    content = files()
    del content["data_batch_2.bin"], content["batches.meta.txt"]
    message = (
        r"no batches\.meta\.txt, data_batch_2\.bin; download the binary version, cifar-10-binary\.tar\.gz, from https"
    )
    refused(unpack(tmp_path / "some", content), message)
    refused(pack(tmp_path / "some.tar.gz", content), message)
    refused(tmp_path / "nowhere", r"no batches.*data_batch_5\.bin; download")


def test_without_a_folder_it_says_what_to_give():
    with pytest.raises(UserError, match=r"data\.source='cifar10': no folder .*give cifar10:FILE or cifar10:FOLDER"):
        open_data("cifar10")


def test_the_python_version_is_refused(tmp_path, small):
    message = "the Python version of CIFAR-10 .* is not read; download the binary version"
    refused(pack(tmp_path / "py.tar.gz", {"data_batch_1": b"\x80\x02"}, "cifar-10-batches-py/"), message)
    unpack(tmp_path / "py" / "cifar-10-batches-py", {"data_batch_1": b"\x80\x02"})
    refused(tmp_path / "py", message)
    refused(tmp_path / "py" / "cifar-10-batches-py", message)


@pytest.mark.parametrize("in_archive", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_batch_3.bin": records(3)[:-1]}, r"data_batch_3\.bin has 12291 bytes, not 4 x 3073"),
        ({"data_batch_3.bin": b""}, r"data_batch_3\.bin has 0 bytes"),
        (
            {"data_batch_4.bin": records(4)[:3073] + b"\x0a" + records(4)[3074:]},
            r"data_batch_4\.bin: image 1 has label 10",
        ),
        ({"batches.meta.txt": b"cat\ndog\n"}, r"batches\.meta\.txt names 2 classes, not 10"),
    ],
)
def test_damaged_files_are_named(tmp_path, small, in_archive, change, message):
    content = {**files(), **change}
    refused(pack(tmp_path / "a.tar.gz", content) if in_archive else unpack(tmp_path / "a", content), message)


def test_too_long_a_file_is_named(tmp_path, small):
    content = {**files(), "data_batch_1.bin": records(1) + b"\0"}
    refused(unpack(tmp_path / "a", content), "has 12293 bytes, not 4 x 3073")
    refused(pack(tmp_path / "a.tar.gz", content), r"data_batch_1\.bin has 12293 bytes, more than 12292")


def test_only_plain_files_of_the_right_folder_count_in_an_archive(tmp_path, small):
    path = pack(tmp_path / "a.tar.gz", files(), "../cifar-10-batches-bin/")
    refused(path, "no batches")
    with tarfile.open(tmp_path / "b.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("cifar-10-batches-bin/data_batch_1.bin")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
    refused(tmp_path / "b.tar.gz", r"no batches.*data_batch_1\.bin")


@pytest.mark.parametrize("twice", ["data_batch_2.bin", "batches.meta.txt"])
@pytest.mark.parametrize("folder", ["cifar-10-batches-bin/", "./cifar-10-batches-bin/"])
def test_an_archive_that_has_a_file_twice_is_refused(tmp_path, small, twice, folder):
    """Unpacked, the last one would count; read in order, any; so neither is taken."""
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, data in [
            *((f"cifar-10-batches-bin/{n}", d) for n, d in files().items()),
            (folder + twice, records(3)),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    refused(tmp_path / "a.tar.gz", rf"a\.tar\.gz: contains several files named {twice}; download the binary version")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_a_truncated_archive_is_an_error(tmp_path, small, share):
    path = pack(tmp_path / "a.tar.gz", files())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, r"a\.tar\.gz: not a readable archive \(.*download the binary")


def test_images_can_be_padded_and_cropped(tmp_path, small):
    folder = unpack(tmp_path / "a", files())
    data = open_data(f"cifar10:{folder}", size=(40, 36), fit="pad")
    assert (data.shape, data.content) == ((3, 40, 36), (32, 32))
    assert open_data(f"cifar10:{folder}", size=(8, 8), fit="resize").shape == (3, 8, 8)


@pytest.mark.parametrize("mode", ["w", "w:bz2", "w:xz"])
def test_other_compressions_are_read(tmp_path, small, mode):
    with tarfile.open(tmp_path / "a.tar", mode) as archive:
        for name, data in files().items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    assert len(open_data(f"cifar10:{tmp_path / 'a.tar'}")) == 20


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_archive_is_unpacked_no_further_than_the_real_one(tmp_path, small, kind, monkeypatch):
    """Headers with attributes are read whole, other members passed over: each may claim any length."""
    monkeypatch.setattr(cifar, "_ARCHIVE_BYTES", 1_000_000)
    member = tarfile.TarInfo("large")
    member.type, member.size = kind, 20_000_000
    content = member.tobuf(tarfile.USTAR_FORMAT) + bytes(20_000_000) + bytes(1024)
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content))
    tracemalloc.start()
    refused(tmp_path / "a.tar.gz", r"a\.tar\.gz: unpacks to more than 1000000 bytes; download the binary version")
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_every_error_is_one_that_a_user_can_mend(tmp_path, small):
    unpack(tmp_path / "py" / "cifar-10-batches-py", {"data_batch_1": b"\x80\x02"})
    with pytest.raises(UserError):
        open_data(f"cifar10:{tmp_path / 'py'}")
