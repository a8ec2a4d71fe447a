"""Images in NumPy files, .npy and .npz."""

from __future__ import annotations

import math
import warnings
import zipfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ...reading import JSON_LIMIT, parse_json, read_text, require_regular
from ..bounded import require_inflatable
from ..dataset import ImageData
from ..opening import one_line
from ..options import Options
from ..rows import ArrayRows, FileRows, Rows
from . import SOURCES, Files

_IMAGE_KEYS = ("images", "arr_0")
_LABEL_KEYS = ("labels", "label", "arr_1")


def open_array(path: Path, options: Options) -> ImageData:
    """Open uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W), C = 1 or 3.

    The images of a .npy file are read on access; optional labels (N,) are beside it, in NAME.labels.npy, and class names
    in NAME.labels.json. A .npz file holds the images as `images` or `arr_0` and optional integer labels (N,) as `labels`,
    `label` or `arr_1`. Pickled content is never loaded.

    Raises:
        UserError: naming the file, for any other content.
    """
    arrays = _read(path)
    images = arrays["images"]
    _require_pixels(images, path)
    last = _channels_last(images.shape, path)
    images = images[:, None] if images.ndim == 3 else images
    if isinstance(images, np.memmap) and images.flags.c_contiguous:  # other orders do not store row after row
        count, *shape = images.shape
        rows: Rows = FileRows(path, images.offset, count, (shape[0], shape[1], shape[2]), channels_last=last)
    else:
        rows = ArrayRows(images.transpose(0, 3, 1, 2) if last else images)
    labels = arrays.get("labels")
    return ImageData(rows, labels, str(path), () if labels is None else _class_names(path, labels))


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return `images` and, if present, `labels`; a .npy file is mapped into memory."""
    try:
        require_regular(path)
        with path.open("rb") as file:
            zipped = file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")
        if not zipped:
            images = np.lib.format.open_memmap(path, mode="r")
            if images.offset + images.nbytes < path.stat().st_size:
                raise UserError("more data follow the first array")
            return {"images": images, **_labels_beside(path)}
        with zipfile.ZipFile(path) as archive:
            members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
            if len(members) < len(archive.infolist()):
                names = [member.filename.removesuffix(".npy") for member in archive.infolist()]
                raise UserError(f"two arrays are named {max(names, key=names.count)}")
            keys = _keys(members)
            arrays = {name: _array(archive, members[key], key) for name, key in keys.items()}
    except Exception as error:  # NumPy and zipfile raise many exception types on broken files
        reason = one_line(error)
        raise UserError(
            f"{path}: cannot be read as plain NumPy arrays ({reason}); save uint8 images with np.save or np.savez"
        ) from None
    unused = [key for key in members if key not in keys.values()]
    if unused:
        warnings.warn(
            f"{path}: {', '.join(unused[:5])} not used; labels are read from {', '.join(_LABEL_KEYS)}", stacklevel=4
        )
    return arrays


def labels_file(path: Path) -> Path:
    """Return where the labels of a .npy file of images are."""
    return path.with_suffix(".labels.npy")


def class_names_file(path: Path) -> Path:
    """Return where the names of the classes of a .npy file of images are: {"class_names": [NAME, ...]}."""
    return path.with_suffix(".labels.json")


def _class_names(path: Path, labels: npt.NDArray[Any]) -> tuple[str, ...]:
    """Return the class names beside a file, or none.

    Raises:
        UserError: naming the file, if it does not hold a name for each label.
    """
    beside = class_names_file(path)
    if not beside.exists():
        return ()
    found = parse_json(read_text(beside, JSON_LIMIT, "JSON"), beside)
    names = found.get("class_names") if isinstance(found, dict) else None
    known = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if not known or (labels.size and int(labels.max()) >= len(names or ())):
        raise UserError(f'{beside}: must hold {{"class_names": [...]}}, a name for each label; mend or remove it')
    return tuple(names or ())


def _labels_beside(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return the labels beside a .npy file of images, if there are any."""
    beside = labels_file(path)
    if not beside.exists():
        return {}
    try:
        require_regular(beside)
        return {"labels": np.array(np.lib.format.open_memmap(beside, mode="r"))}
    except Exception as error:  # NumPy raises many exception types on broken files
        raise UserError(f"{beside.name}, its labels: {one_line(error)}") from None


def _keys(members: Collection[str]) -> dict[str, str]:
    """Return the key of `images` and, if present, of `labels`."""
    images = [key for key in _IMAGE_KEYS if key in members]
    labels = [key for key in _LABEL_KEYS if key in members]
    if not images:
        raise UserError(f"no array {' or '.join(_IMAGE_KEYS)} among {', '.join(members)}")
    return {"images": images[0], **({"labels": labels[0]} if labels else {})}


def _array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, key: str) -> npt.NDArray[Any]:
    """Read an array; before allocating memory, check its claimed length against the stored bytes."""
    if member.flag_bits & 1:
        raise UserError(f"{key} is encrypted")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{key} is compressed by method {member.compress_type}, not deflate")
    try:
        require_inflatable(member.file_size, member.compress_size)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
        if version[0] not in readers:
            raise UserError(f"{key} has version {version[0]} of the .npy format, which is not supported")
        read_header = readers[version[0]]
        shape, _, dtype = read_header(file)
        stored = member.file_size - file.tell()
    size = math.prod(shape) * dtype.itemsize
    if size != stored:
        raise UserError(f"{key} of shape {shape} has {size} bytes, but {stored} are stored")
    with archive.open(member) as file:
        array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    return array


def _require_pixels(images: npt.NDArray[Any], path: Path) -> None:
    if images.dtype == np.uint8:
        return
    mend = "convert them to uint8 (0..255)"
    if np.issubdtype(images.dtype, np.floating) and images.size:
        part = images[:256]
        strange = int(np.sum(~np.isfinite(part)))
        if strange:
            of = f"the first {len(part)} images" if len(part) < len(images) else "them"
            raise UserError(
                f"{path}: images are {images.dtype}, not uint8, and {strange} values in {of} are not finite (NaN or infinite); "
                f"correct these images, then {mend}"
            )
        low = float(part.min())
        formula = "np.round(x * 255)" if low >= 0 else "np.round((x + 1) * 127.5)"
        where = f"in about [{low:.3g}, {float(part.max()):.3g}]"
        mend = f"values {where}; convert them, e.g. {formula}.astype(np.uint8) for [{0 if low >= 0 else -1}, 1]"
    raise UserError(f"{path}: images are {images.dtype}, not uint8: {mend}")


def _channels_last(shape: tuple[int, ...], path: Path) -> bool:
    """Return whether images of this shape are (N, H, W, C); else they are (N, C, H, W) or (N, H, W)."""
    if 0 in shape or len(shape) not in (3, 4):
        raise UserError(f"{path}: images of shape {shape}; give (N, H, W), (N, H, W, C) or (N, C, H, W), not empty")
    if len(shape) == 3:
        return False
    first, last = shape[1] in (1, 3), shape[3] in (1, 3)
    if first and last:
        raise UserError(
            f"{path}: images of shape {shape} could be (N, C, H, W) or (N, H, W, C); save grey images as (N, H, W), "
            "colour ones as PNG files"
        )
    if not first and not last:
        raise UserError(
            f"{path}: images of shape {shape} have neither 1 nor 3 channels, first or last; "
            f"{'drop the alpha channel' if 4 in (shape[1], shape[3]) else 'convert them to grey or RGB'}"
        )
    return last


SOURCES.add("arrays")(Files(".npy or .npz", lambda path: path.suffix.lower() in (".npy", ".npz"), open_array))
