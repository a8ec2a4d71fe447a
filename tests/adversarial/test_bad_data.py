"""Data sets that cannot be read, or that would be read wrongly."""

from __future__ import annotations

import gzip
import io
import json
import os
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from adversary import DEEP, Case, both, cases, fifo, file, files, folder_in_place, npy, npz, pixels
from PIL import Image


def picture(mode: str = "L", size: tuple[int, int] = (8, 8), kind: str = "PNG", value: Any = 100) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, value).save(buffer, kind)
    return buffer.getvalue()


PNG, COLOURED = picture(), picture("RGB", value=(1, 2, 3))
LISTED = {"a.png": PNG, "b.png": picture(value=7)}


def zipped(members: dict[str, bytes | str], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def idx(*sizes: int, data: bytes = b"", kind: int = 8) -> bytes:
    return bytes((0, 0, kind, len(sizes))) + struct.pack(f">{len(sizes)}I", *sizes) + data


def header(text: str) -> bytes:
    """Return a .npy file of a header of one's own, and no data."""
    body = text.encode() + b" " * (63 - (10 + len(text)) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


def archived(members: dict[str, bytes], compress: str = "gz") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compress}") as archive:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def listing(content: Any) -> Callable[[Path], None]:
    text = content if isinstance(content, str | bytes) else json.dumps(content)
    return files({f"d/{name}": data for name, data in LISTED.items()} | {"d/dataset.json": text})


def link(name: str, target: str) -> Callable[[Path], None]:
    return lambda folder: os.symlink(target, folder / name)


GOOD = npz(images=pixels(20), labels=np.arange(20) % 2)
STORED = npy(pixels(20))
OBJECTS = np.array([{"a": 1}, None], dtype=object)

ARRAYS: dict[str, bytes] = {
    "empty.npz": b"",
    "empty.npy": b"",
    "text.npy": b"hello",
    "text.npz": b"hello, this is no archive",
    "half.npz": GOOD[: len(GOOD) // 2],
    "tail.npz": GOOD[-60:],
    "half.npy": STORED[:300],
    "half header.npy": STORED[:20],
    "nothing inside.npz": zipped({}),
    "other names.npz": npz(x=pixels()),
    "one image.npz": npz(images=pixels(1)),
    "no images.npz": npz(images=pixels(0)),
    "flat.npz": npz(images=np.zeros(12, np.uint8)),
    "scalar.npz": npz(images=np.uint8(3)),
    "five axes.npz": npz(images=np.zeros((2, 1, 1, 8, 8), np.uint8)),
    "two channels.npz": npz(images=np.zeros((9, 2, 8, 8), np.uint8)),
    "four channels.npz": npz(images=np.zeros((9, 8, 8, 4), np.uint8)),
    "unclear channels.npz": npz(images=np.zeros((9, 3, 8, 3), np.uint8)),
    "zero width.npz": npz(images=np.zeros((9, 8, 0), np.uint8)),
    "floats.npz": npz(images=np.zeros((9, 8, 8), np.float32)),
    "nan.npz": npz(images=np.full((9, 8, 8), np.nan)),
    "int64.npz": npz(images=np.zeros((9, 8, 8), np.int64)),
    "bool.npz": npz(images=np.zeros((9, 8, 8), bool)),
    "complex.npz": npz(images=np.zeros((9, 8, 8), complex)),
    "texts.npz": npz(images=np.array(["a", "b"])),
    "dates.npz": npz(images=np.zeros((9, 8, 8), "datetime64[s]")),
    "void.npz": npz(images=np.zeros((9, 8), [("a", "u1")])),
    "objects.npz": npz(images=OBJECTS),
    "objects.npy": npy(OBJECTS),
    "pickled labels.npz": npz(images=pixels(2), labels=OBJECTS),
    "few labels.npz": npz(images=pixels(9), labels=np.arange(8)),
    "float labels.npz": npz(images=pixels(9), labels=np.arange(9) + 0.5),
    "nan labels.npz": npz(images=pixels(9), labels=np.full(9, np.nan)),
    "text labels.npz": npz(images=pixels(2), labels=np.array(["a", "b"])),
    "negative labels.npz": npz(images=pixels(9), labels=np.arange(9) - 1),
    "huge labels.npz": npz(images=pixels(9), labels=np.arange(9) * 2**40),
    "unsigned labels.npz": npz(images=pixels(2), labels=np.array([0, 2**64 - 1], np.uint64)),
    "one-hot labels.npz": npz(images=pixels(9), labels=np.eye(9, dtype=np.int64)),
    "raw member.npz": zipped({"images.npy": b"not an array"}),
    "member without suffix.npz": zipped({"images": b"not an array"}),
    "huge shape.npz": zipped(
        {"images.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8), }")}
    ),
    "negative shape.npz": zipped(
        {"images.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8), }")}
    ),
    "huge shape.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000, 8, 8), }"),
    "negative shape.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (-5, 8, 8), }"),
    "overflowing shape.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': (9223372036854775808, 8, 8), }"),
    "shape of text.npy": header("{'descr': '|u1', 'fortran_order': False, 'shape': 'x', }"),
    "unknown type.npy": header("{'descr': '|z9', 'fortran_order': False, 'shape': (2, 8, 8), }"),
    "code in header.npy": header("__import__('os').system('touch pwned')"),
    "unclosed header.npy": header("{'descr': '|u1', " + "(" * 300),
    "flipped.npz": flipped(GOOD, 70),
    "version.npy": flipped(STORED, 6),
    "jpeg.npz": picture(kind="JPEG"),
    "flipped directory.npz": flipped(GOOD, len(GOOD) - 10),
}

DATASET: dict[str, Any] = {
    "empty": "",
    "no JSON": "{labels: x}",
    "a list": [1],
    "null": "null",
    "without labels": {"names": []},
    "of text": {"labels": "a.png"},
    "of numbers": {"labels": [1, 2]},
    "of triples": {"labels": [["a.png", 0, 1], ["b.png", 1, 1]]},
    "of one image": {"labels": [["a.png", 0]]},
    "of another image": {"labels": [["c.png", 0], ["b.png", 1]]},
    "twice": {"labels": [["a.png", 0], ["a.png", 1], ["b.png", 1]]},
    "twice by another path": {"labels": [["a.png", 0], ["./a.png", 1], ["b.png", 1]]},
    "of two keys": '{"labels": null, "labels": [["a.png", 0], ["b.png", 1]]}',
    "of floats": {"labels": [["a.png", 0.5], ["b.png", 1]]},
    "of true": {"labels": [["a.png", True], ["b.png", 1]]},
    "of text labels": {"labels": [["a.png", "0"], ["b.png", 1]]},
    "negative": {"labels": [["a.png", -1], ["b.png", 1]]},
    "huge": {"labels": [["a.png", 10**30], ["b.png", 1]]},
    "large": {"labels": [["a.png", 10**8], ["b.png", 1]]},
    "null for one": {"labels": [["a.png", None], ["b.png", 1]]},
    "deep": '{"labels": ' + DEEP + "}",
    "deep and open": '{"labels": ' + "[" * 100_000,
    "Latin-1": '{"labels": [["é.png", 0]]}'.encode("latin-1"),
    "infinite": '{"labels": [["a.png", Infinity], ["b.png", NaN]]}',
    "integer of digits": '{"labels": [["a.png", ' + "9" * 5000 + '], ["b.png", 1]]}',
}


def _image(name: str, content: bytes) -> Callable[[Path], None]:
    return files({"d/a.png": PNG, f"d/{name}": content})


FOLDERS: dict[str, Callable[[Path], Any]] = {
    "of nothing": folder_in_place("d"),
    "of one image": file("d/a.png", PNG),
    "of a text called png": _image("b.png", b"hello"),
    "of an empty image": _image("b.png", b""),
    "of half an image": _image("b.png", COLOURED[:40]),
    "of a flipped image": _image("b.png", flipped(COLOURED, 45)),
    "of PostScript called png": _image("b.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"),
    "of PDF called png": _image("b.png", b"%PDF-1.4\n"),
    "of SVG called png": _image("b.png", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "of another size": _image("b.png", picture(size=(9, 8))),
    "of an image too large": _image("b.png", PNG[:16] + struct.pack(">II", 60_000, 60_000) + PNG[24:]),
    "of an image without width": _image("b.png", PNG[:16] + struct.pack(">II", 0, 8) + PNG[24:]),
    "of float TIFF": _image("b.tif", picture("F", kind="TIFF", value=0.5)),
    "of 32-bit TIFF": _image("b.tif", picture("I", kind="TIFF", value=5)),
    "of half a TIFF": _image("b.tif", picture(kind="TIFF")[:60]),
    "of half a JPEG": _image("b.jpg", picture(kind="JPEG")[:200]),
    "of half a GIF": _image("b.gif", picture(kind="GIF")[:20]),
    "of half a WEBP": _image("b.webp", picture(kind="WEBP")[:24]),
    "of a PPM of a huge number": _image("b.ppm", b"P5 99999999999999999999 8 255\n"),
    "of a PPM of text": _image("b.ppm", b"P5 x y z\n"),
    "of a pipe": both(file("d/a.png", PNG), fifo("d/b.png")),
    "of a device": both(file("d/a.png", PNG), link("d/b.png", "/dev/zero")),
    "of a lost link": both(file("d/a.png", PNG), link("d/b.png", "nowhere.png")),
    "of a link to itself": both(file("d/a.png", PNG), link("d/b.png", "b.png")),
    "of a folder called png": both(file("d/a.png", PNG), lambda folder: (folder / "d/b.png").mkdir()),
    "of texts": files({"d/a.txt": "a", "d/b.txt": "b"}),
    "of a listing below": files({"d/a.png": PNG, "d/x/b.png": PNG, "d/x/dataset.json": '{"labels": null}'}),
    "of two listings": files(
        {"d/x/b.png": PNG, "d/dataset.json": '{"labels": null}', "d/x/dataset.json": '{"labels": null}'}
    ),
    "of a listing that is a pipe": both(files({f"d/{n}": c for n, c in LISTED.items()}), fifo("d/dataset.json")),
    "of control characters": _image("\x1b[2J\u202egnp.png", b"no image"),
    "of two lines": _image("b\nmsdiff: done.png", b"no image"),
    **{f"whose dataset.json is {name}": listing(content) for name, content in DATASET.items()},
}

ARCHIVES: dict[str, bytes] = {
    "empty.zip": b"",
    "text.zip": b"hello",
    "nothing.zip": zipped({}),
    "texts.zip": zipped({"a.txt": "a"}),
    "half.zip": zipped(LISTED)[:80],
    "flipped.zip": flipped(zipped(LISTED), 50),
    "bad image.zip": zipped(LISTED | {"c.png": b"no"}),
    "twice.zip": zipped({"a.png": PNG, "x\\..\\a.png": PNG, "./a.png": PNG}),
    "bomb.zip": zipped(LISTED | {"c.png": b"\0" * 50_000_000}),
    "bomb listing.zip": zipped(LISTED | {"dataset.json": b" " * 300_000_000}),
    "listing.zip": zipped(LISTED | {"dataset.json": "[]"}),
    "lzma.zip": flipped(zipped(LISTED, zipfile.ZIP_LZMA), 60),
    "unknown method.zip": zipped(LISTED).replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x08", b"PK\x01\x02\x14\x03\x14\x00\x00\x00\x63"
    ),
    "encrypted.zip": (Path(__file__).parents[1] / "data/cases/enc.zip").read_bytes(),
    "end only.zip": b"PK\x05\x06" + b"\xff" * 18,
}

FASHION = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte")
LABELS = idx(2, data=b"\0\1")
IDX: dict[str, dict[str, bytes | str]] = {
    "nothing": {"f/x": ""},
    "no labels": {f"f/{FASHION[0]}": idx(2, 8, 8, data=bytes(128))},
    "empty": {f"f/{FASHION[0]}": b"", f"f/{FASHION[1]}": LABELS},
    "short header": {f"f/{FASHION[0]}": idx(2, 8, 8)[:9], f"f/{FASHION[1]}": LABELS},
    "short data": {f"f/{FASHION[0]}": idx(2, 8, 8, data=bytes(100)), f"f/{FASHION[1]}": LABELS},
    "long data": {f"f/{FASHION[0]}": idx(2, 8, 8, data=bytes(200)), f"f/{FASHION[1]}": LABELS},
    "floats": {f"f/{FASHION[0]}": idx(2, 8, 8, kind=13), f"f/{FASHION[1]}": LABELS},
    "no size": {f"f/{FASHION[0]}": idx(0, 8, 8), f"f/{FASHION[1]}": LABELS},
    "huge": {f"f/{FASHION[0]}": idx(2**32 - 1, 2**32 - 1, 2**32 - 1), f"f/{FASHION[1]}": LABELS},
    "large": {f"f/{FASHION[0]}": idx(60_000, 2**14, 2**14), f"f/{FASHION[1]}": LABELS},
    "more labels": {f"f/{FASHION[0]}": idx(2, 8, 8, data=bytes(128)), f"f/{FASHION[1]}": idx(3, data=b"\0\1\2")},
    "no gzip": {f"f/{FASHION[0]}.gz": b"hello", f"f/{FASHION[1]}": LABELS},
    "half gzip": {f"f/{FASHION[0]}.gz": gzip.compress(idx(2, 8, 8, data=bytes(128)))[:30], f"f/{FASHION[1]}": LABELS},
    "bomb": {
        f"f/{FASHION[0]}.gz": gzip.compress(idx(60_000, 28, 28, data=bytes(60_000_000))),
        f"f/{FASHION[1]}": LABELS,
    },
}

META = b"a\n" * 10
CIFAR: dict[str, bytes] = {
    "empty": b"",
    "text": b"hello",
    "half": archived({"cifar-10-batches-bin/batches.meta.txt": META})[:40],
    "nothing": archived({}),
    "python": archived({"cifar-10-batches-py/data_batch_1": b"\x80\x04."}),
    "short": archived({"cifar-10-batches-bin/data_batch_1.bin": b"\0" * 100}),
    "long": archived({"cifar-10-batches-bin/data_batch_1.bin": b"\0" * 31_000_000}),
    "bomb": archived({"x": b"\0" * 60_000_000, "cifar-10-batches-bin/batches.meta.txt": META}, "xz"),
    "long meta": archived({"cifar-10-batches-bin/batches.meta.txt": b"a\n" * 10_000}),
    "outside": archived({"../../cifar-10-batches-bin/batches.meta.txt": META}),
}

SOURCES = (
    "",
    " ",
    "digit",
    "digits:x",
    "cifar10",
    "cifar10:absent",
    "fashion-mnist:absent",
    "hf:",
    "hf:./absent",
    "hf:~nobody/x",
    "a\x1b[31mb",
    "[red]x",
    "\u202egnp.zip",
    "x" * 5000,
    "~nobody/x",
    "../../..//absent.zip",
    "https://example.invalid/x.zip",
    "s3://bucket/x",
    "/dev/zero",
    "/dev/stdin",
    "/proc/self/mem",
    "taken.txt",
    "taken.pkl",
)


def _opened(name: str, source: str, make: Callable[[Path], Any], says: str = "") -> Case:
    return Case(name, ("stats", source, "--out", "new.npz", "--part", "all"), make, says)


@cases([_opened(name, name, file(name, content), "npz?") for name, content in ARRAYS.items()])
def test_arrays(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([_opened(f"folder {name}", "d", make) for name, make in FOLDERS.items()])
def test_folders(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([_opened(name, name, file(name, content), name) for name, content in ARCHIVES.items()])
def test_archives(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([_opened(f"idx {name}", "fashion-mnist:f", files(contents)) for name, contents in IDX.items()])
def test_idx(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([_opened(f"cifar {name}", "cifar10:c.tar.gz", file("c.tar.gz", content)) for name, content in CIFAR.items()])
def test_cifar(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


TAKEN = files({"taken.txt": "mine", "taken.pkl": b"\x80\x04."})


@cases([_opened(f"source {name[:30]}", name, TAKEN) for name in SOURCES])
def test_sources(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases([_opened("npz that is a pipe", "p.npz", fifo("p.npz")), _opened("zip that is a pipe", "p.zip", fifo("p.zip"))])
def test_pipes(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)
