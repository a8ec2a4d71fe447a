"""CIFAR-10, read from its binary files (Krizhevsky 2009, "Learning multiple layers of features from tiny images")."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...reading import read_file
from ..bounded import FILE_LIMIT
from ..dataset import ImageData
from ..opening import one_line
from ..options import Options
from . import SOURCES, Named, to_path

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar.html"
RECORDS = 10_000  # images per file
PIXELS = (3, 32, 32)  # red, green and blue plane, each row by row
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the pixels

BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
META = "batches.meta.txt"  # the class names, one per line

_FOLDER, _PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
_ARCHIVE_BYTES = 1 << 29  # limit of the unpacked archive; the original has 184 MB
_META_BYTES = 10_000  # far more than ten names need


def open_cifar10(rest: str, options: Options) -> ImageData:
    """Open the 50,000 training images, uint8 (N, 3, 32, 32), of the binary version.

    Args:
        rest: the folder with the files, its parent folder (of cifar-10-batches-bin/), or the downloaded archive
            cifar-10-binary.tar.gz, which is not unpacked to disk. An empty text raises.
        options: not used.

    Raises:
        UserError: if rest is empty, for the Python version, or if files are missing (the message gives the address),
            damaged or twice in the archive.
    """
    if not rest:
        raise UserError(f"data.source='cifar10': no folder or archive is given; {_mend()}")
    path = to_path(rest)
    images = np.empty((len(BATCHES) * RECORDS, *PIXELS), np.uint8)
    labels = np.empty(len(images), np.int64)
    class_names: tuple[str, ...] = ()
    missing = {*BATCHES, META}
    for name, content in _archived(path) if path.is_file() else _in_folder(path):
        missing.discard(name)
        if name == META:
            class_names = tuple(content.decode("utf-8", "replace").split())
            continue
        start = BATCHES.index(name) * RECORDS
        rows = slice(start, start + RECORDS)
        images[rows], labels[rows] = _records(content, f"{path}: {name}")
    if missing:
        raise UserError(f"{path}: no {', '.join(sorted(missing))}; {_mend()}")
    if len(class_names) != 10:
        raise UserError(f"{path}: {META} names {len(class_names)} classes, not 10; download the archive again")
    return ImageData(images, labels, f"cifar10:{path}", class_names)


def _records(content: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the images (RECORDS, 3, 32, 32) and labels (RECORDS,) of a file."""
    if len(content) != RECORDS * RECORD:
        raise UserError(f"{where} has {len(content)} bytes, not {RECORDS} x {RECORD}; download the archive again")
    rows = np.frombuffer(content, np.uint8).reshape(RECORDS, RECORD)
    labels = rows[:, 0]
    if labels.max() > 9:
        row = int(np.argmax(labels > 9))
        raise UserError(f"{where}: image {row} has label {labels[row]}, above 9; download the archive again")
    return rows[:, 1:].reshape(RECORDS, *PIXELS), labels


def _in_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each existing file."""
    folder = path / _FOLDER if (path / _FOLDER).is_dir() else path
    wanted = [name for name in (META, *BATCHES) if (folder / name).is_file()]
    if not wanted and any((path / name).exists() for name in (_PYTHON, "data_batch_1")):
        raise _python_version(path)
    for name in wanted:
        try:
            yield name, read_file(folder / name, FILE_LIMIT)
        except UserError as error:
            raise UserError(f"{folder / name}: cannot be read ({error}); {_mend()}") from None


def _archived(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of each needed archive member; raise if one is there twice or longer than expected."""
    found = set[str]()
    try:
        with _unpacked(path) as content, tarfile.open(fileobj=content, mode="r:") as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == _PYTHON:
                    raise _python_version(path)
                if folder != _FOLDER or name not in (META, *BATCHES) or not member.isfile():
                    continue
                if name in found:
                    raise UserError(f"{path}: contains several files named {name}; {_mend()}")
                found.add(name)
                limit = _META_BYTES if name == META else RECORDS * RECORD
                if member.size > limit:
                    raise UserError(f"{path}: {name} has {member.size} bytes, more than {limit}; {_mend()}")
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read()
    except UserError:
        raise
    except Exception as error:  # tarfile and the decompressors raise many exception types on broken files
        raise UserError(f"{path}: not a readable archive ({one_line(error)}); {_mend()}") from None


def _unpacked(path: Path) -> _Bounded:
    """Open an archive for reading its decompressed content; the first bytes determine the compression."""
    with path.open("rb") as file:
        start = file.read(6)
    opened: dict[bytes, Callable[[Path], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
    opener = next((opener for magic, opener in opened.items() if start.startswith(magic)), None)
    return _Bounded(path.open("rb") if opener is None else opener(path), str(path))


class _Bounded(io.RawIOBase):
    """A file that is never read beyond _ARCHIVE_BYTES, as protection against decompression bombs."""

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file, self._name = file, name

    def read(self, size: int = -1) -> bytes:
        if size < 0 or self.tell() + size > _ARCHIVE_BYTES:
            raise self._too_long()
        return self._file.read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 0 or offset > _ARCHIVE_BYTES:
            raise self._too_long()
        return self._file.seek(offset)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()

    def _too_long(self) -> UserError:
        return UserError(f"{self._name}: unpacks to more than {_ARCHIVE_BYTES} bytes; {_mend()}")


def _python_version(path: Path) -> UserError:
    return UserError(f"{path}: the Python version of CIFAR-10 (pickles) is not read; {_mend()}")


def _mend() -> str:
    return (
        f"download the binary version, cifar-10-binary.tar.gz, from {ADDRESS} and give cifar10:FILE or cifar10:FOLDER"
    )


SOURCES.add("cifar10")(Named("cifar10:FOLDER", open_cifar10))
