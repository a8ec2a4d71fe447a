"""Packing of a data set into one file, whose images are read without decoding large ones again."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import DataConfig
from ..data import ImageData
from ..data.sources import open_configured
from ..data.sources.arrays import class_names_file, labels_file
from ..data.visible import LISTING
from ..data.workers import each
from ..errors import UserError
from ..files import new_file, write_json
from ..output_paths import require_place
from ..progress import Progress

SUFFIXES = (".zip", ".npy")

_DATE = (1980, 1, 1, 0, 0, 0)  # equal data give equal files


def pack(
    data: ImageData | DataConfig | str,
    out: Path | str,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ImageData:
    """Write all images of a data set, held-out ones included, and their labels into one file, without loss.

    Args:
        data: an opened data set, its configuration (with the size of the images), or its source.
        out: FILE.zip: PNG images and dataset.json, as EDM's data sets; the file can be used for a folder anywhere. FILE.npy:
            an array, read faster and larger; labels go to FILE.labels.npy, their names to FILE.labels.json.
        overwrite: replace an existing file.
        progress: called with (images written, total).

    Returns:
        The data set that was packed; its fingerprint is that of the file.

    Raises:
        UserError: if the data cannot be read, or the file cannot be written or exists.
    """
    out = Path(out)
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: must end in {' or '.join(SUFFIXES)}, which says what is written")
    written = (out, labels_file(out), class_names_file(out)) if out.suffix.lower() == ".npy" else (out,)
    for path in written:
        if path.exists() and not overwrite:
            raise UserError(f"--out {path}: exists; choose another name or give --overwrite")
        require_place(path)
    opened = data if isinstance(data, ImageData) else open_configured(_configuration(data))
    if out.suffix.lower() == ".npy" and opened.shape[0] == 3 and opened.shape[2] in (1, 3):
        raise UserError(
            f"--out {out}: an array of colour images {opened.shape[2]} pixels wide could be read in two ways; name a .zip file"
        )
    write = _write_zip if out.suffix.lower() == ".zip" else _write_array
    write(opened, out, overwrite, progress or (lambda *_: None))
    return opened


def _configuration(data: DataConfig | str) -> DataConfig:
    return DataConfig(source=data) if isinstance(data, str) else data


def _images(data: ImageData, progress: Progress) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield parts of the images, (n, C, H, W), and tell when each has been dealt with."""
    done = 0
    for part in data.chunks():
        yield part
        done += len(part)
        progress(done, len(data))


def _write_zip(data: ImageData, out: Path, overwrite: bool, progress: Progress) -> None:
    """Write the images as members of a zip file, in the order of their names."""
    names: list[str] = []
    with new_file(out, overwrite=overwrite) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for part in _images(data, progress):
            for content in each(partial(_pngs, part), range(len(part))):
                number = f"{len(names):08d}"
                names.append(f"{number[:5]}/img{number}.png")
                archive.writestr(zipfile.ZipInfo(names[-1], _DATE), content)
        archive.writestr(zipfile.ZipInfo(LISTING, _DATE), _listing(data, names))


def _pngs(images: npt.NDArray[np.uint8], rows: Sequence[int]) -> list[bytes]:
    return [_png(images[row]) for row in rows]


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    """Return an image (C, H, W) as a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def _listing(data: ImageData, names: list[str]) -> str:
    """Return the text of dataset.json; without labels it says so, because folders would count as classes."""
    if data.labels is None:
        return json.dumps({"labels": None})
    labels = [[name, int(label)] for name, label in zip(names, data.labels, strict=True)]
    return json.dumps({"labels": labels, "class_names": list(data.class_names)})


def _write_array(data: ImageData, out: Path, overwrite: bool, progress: Progress) -> None:
    """Write the images as an array (N, 3, H, W), grey ones as (N, H, W); its labels get their name just before it."""
    channels, height, width = data.shape
    with new_file(out, overwrite=overwrite) as file:
        _write_header(file, (len(data), *((channels,) if channels > 1 else ()), height, width), "|u1")
        for part in _images(data, progress):
            file.write(part.reshape(-1).data)
        if data.labels is None:
            for path in (labels_file(out), class_names_file(out)):
                path.unlink(missing_ok=True)  # of the file that is replaced
            return
        with new_file(labels_file(out), overwrite=overwrite) as labels:
            _write_header(labels, data.labels.shape, "<i8")
            labels.write(data.labels.astype("<i8").tobytes())
        write_json(class_names_file(out), {"class_names": list(data.class_names)})


def _write_header(file: BinaryIO, shape: tuple[int, ...], kind: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"shape": shape, "fortran_order": False, "descr": kind})
