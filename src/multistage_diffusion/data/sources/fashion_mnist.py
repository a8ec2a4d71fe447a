"""Fashion-MNIST, read from its idx files."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...reading import require_regular
from ..bounded import require_inflatable
from ..dataset import ImageData
from ..opening import one_line
from ..options import Options
from . import SOURCES, Named, to_path

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the Debian package dataset-fashion-mnist

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_IMAGES, _LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
_MORE = 1024  # bytes read beyond the expected length, to detect a file that is too long


def open_fashion_mnist(rest: str, options: Options) -> ImageData:
    """Open the 60,000 training images, uint8 (N, 1, 28, 28), from idx files, compressed (.gz) or not.

    Args:
        rest: folder of the files; empty: the folder of Debian's package.
        options: not used.

    Raises:
        UserError: if files are missing (the message explains how to get them) or damaged (it names the file).
    """
    folder = to_path(rest) if rest else DEBIAN_FOLDER
    images, labels = read_idx(_find(folder, _IMAGES), 3), read_idx(_find(folder, _LABELS), 1)
    name = f"fashion-mnist:{folder}" if rest else "fashion-mnist"
    return ImageData(images[:, None], labels.astype(np.int64), name, CLASS_NAMES)


def _find(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise UserError(
        f"data.source='fashion-mnist': no {stem} (.gz or not) in {folder}; install Debian's package "
        f"dataset-fashion-mnist, or give fashion-mnist:FOLDER with the four idx files"
    )


def read_idx(path: Path, dimensions: int) -> npt.NDArray[np.uint8]:
    """Read an idx file of uint8 values.

    The format: two zero bytes, the type (8: uint8), the number of dimensions, their sizes as big-endian uint32, data.

    Raises:
        UserError: naming the file, if it has another format or a wrong length.
    """
    start = 4 + 4 * dimensions
    try:
        compressed = require_regular(path)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(start)
            if len(header) < start or header[:4] != bytes((0, 0, 8, dimensions)):
                raise UserError(
                    f"starts with {header[:4].hex() or 'nothing'}, not an idx file of {dimensions}-dimensional bytes "
                    f"(0000080{dimensions})"
                )
            shape = struct.unpack(f">{dimensions}I", header[4:])
            length = math.prod(shape)
            require_inflatable(length, compressed)
            data = file.read(length + _MORE)
    except UserError as error:
        raise UserError(f"{path}: {error}; download the file again") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); download the file again") from None
    if len(data) != length or 0 in shape:
        most = "at least " if len(data) == length + _MORE else ""
        raise UserError(
            f"{path}: has {most}{len(data)} bytes for {' x '.join(map(str, shape))}; download the file again"
        )
    return np.frombuffer(data, np.uint8).reshape(shape)


SOURCES.add("fashion-mnist")(Named("fashion-mnist[:FOLDER]", open_fashion_mnist))
