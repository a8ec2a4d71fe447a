"""CIFAR-10 in its binary files (Krizhevsky 2009, "Learning multiple layers of features from tiny images")."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .dataset import ImageData
from .decoding import one_line

ADDRESS = "https://www.cs.toronto.edu/~kriz/cifar.html"
RECORDS = 10_000  # images in a file
PIXELS = (3, 32, 32)  # red, green and blue plane, each row by row
RECORD = 1 + 3 * 32 * 32  # bytes: the label, then the pixels

BATCHES = tuple(f"data_batch_{i}.bin" for i in range(1, 6))
META = "batches.meta.txt"  # the names of the classes, one a line

_FOLDER, _PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
_META_BYTES = 10_000  # far more than ten names need


def open_cifar10(path: Path | None) -> ImageData:
    """Open the 50,000 training images, uint8 (N, 3, 32, 32), of the binary version.

    Args:
        path: the folder that holds the files, the folder that holds cifar-10-batches-bin/, or the archive
            cifar-10-binary.tar.gz as downloaded, which is not unpacked to disk. None is an error that says so.

    Raises:
        UserError: if it is the Python version, if files are missing (saying where they come from) or damaged.
    """
    if path is None:
        raise UserError(f"data.source='cifar10': needs its files; {_mend()}")
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
        raise UserError(f"{path}: {META} names {len(class_names)} classes instead of 10; fetch the archive again")
    return ImageData(images, labels, f"cifar10:{path}", class_names)


def _records(content: bytes, where: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Return the images and labels of a file."""
    if len(content) != RECORDS * RECORD:
        raise UserError(f"{where} holds {len(content)} bytes instead of {RECORDS} x {RECORD}; fetch the archive again")
    rows = np.frombuffer(content, np.uint8).reshape(RECORDS, RECORD)
    labels = rows[:, 0]
    if labels.max() > 9:
        row = int(np.argmax(labels > 9))
        raise UserError(f"{where}: image {row} has label {labels[row]}, above 9; fetch the archive again")
    return rows[:, 1:].reshape(RECORDS, *PIXELS), labels


def _in_folder(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the files that are there, by name."""
    folder = path / _FOLDER if (path / _FOLDER).is_dir() else path
    wanted = [name for name in (META, *BATCHES) if (folder / name).is_file()]
    if not wanted and any((path / name).exists() for name in (_PYTHON, "data_batch_1")):
        raise _python_version(path)
    for name in wanted:
        try:
            yield name, (folder / name).read_bytes()
        except OSError as error:
            raise UserError(f"{folder / name}: cannot be read ({error.strerror})") from None


def _archived(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the wanted members of the archive, by name: read into memory, and only where their length is right."""
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                if folder == _PYTHON:
                    raise _python_version(path)
                if folder != _FOLDER or name not in (META, *BATCHES) or not member.isfile():
                    continue
                limit = _META_BYTES if name == META else RECORDS * RECORD
                if member.size > limit:
                    raise UserError(f"{path}: {name} holds {member.size} bytes, more than {limit}; {_mend()}")
                file = archive.extractfile(member)
                assert file is not None
                yield name, file.read()
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a readable archive ({one_line(error)}); {_mend()}") from None


def _python_version(path: Path) -> ValueError:
    return ValueError(f"{path}: is the Python version of CIFAR-10 (pickles), which is never read; {_mend()}")


def _mend() -> str:
    return f"take CIFAR-10's binary version, cifar-10-binary.tar.gz, from {ADDRESS} and give cifar10:FILE or cifar10:FOLDER"
