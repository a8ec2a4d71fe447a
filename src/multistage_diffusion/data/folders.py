"""Folders and zip files of images, with class labels from dataset.json or sub-folders."""

from __future__ import annotations

import json
import os
import posixpath
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .dataset import ImageData
from .decoding import Progress, decode_all, one_line
from .fitting import Fit

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def open_images(
    path: Path,
    *,
    size: tuple[int, int] | None = None,
    fit: Fit = "exact",
    skip_bad: bool = False,
    progress: Progress | None = None,
) -> ImageData:
    """Read all images (PNG, JPEG, BMP, WebP) below a folder or in a zip file, sorted by path.

    Grey images give one channel; where any is in colour, all become RGB. Transparent parts become white. EXIF
    orientation is applied. Hidden files and __MACOSX are passed over.

    Args:
        path: an existing folder or zip file (never unpacked to disk).
        size, fit, skip_bad, progress: as for `decode_all`.

    Raises:
        UserError: naming the file, for missing labels and as `decode_all`; if there are no images.
    """
    with _files(path) as (names, read):
        paths = sorted(name for name in names if name.lower().endswith(SUFFIXES))
        if not paths:
            raise UserError(f"{path}: holds no images ({', '.join(SUFFIXES)})")
        labels, class_names = _labels(path, paths, read("dataset.json") if "dataset.json" in names else None)
        decoded = decode_all(
            str(path),
            paths,
            lambda number: read(paths[number]),
            size=size,
            fit=fit,
            skip_bad=skip_bad,
            progress=progress,
        )
    kept_labels = None if labels is None else np.array(labels, np.int64)[decoded.kept]
    return ImageData(decoded.images, kept_labels, str(path), class_names, decoded.content)


@contextmanager
def _files(path: Path) -> Iterator[tuple[set[str], Callable[[str], bytes]]]:
    """Yield the names of the visible files, relative with forward slashes, and a function that reads one."""
    if path.is_dir():
        yield _visible(_walk(path)), lambda name: (path / name).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: not a readable zip file ({one_line(error)})") from None
    with archive:
        yield _visible(archive.namelist()), archive.read


def _walk(root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: folder cannot be listed ({error.strerror})")

    for folder, children, files in os.walk(root, onerror=refuse, followlinks=True):
        # a link to one of its own ancestors would be followed for ever
        real = Path(os.path.realpath(folder))
        children[:] = [c for c in children if not real.is_relative_to(os.path.realpath(os.path.join(folder, c)))]
        yield from (Path(folder, file).relative_to(root).as_posix() for file in files)


def _visible(names: Iterator[str] | list[str]) -> set[str]:
    return {n for n in names if not any(part.startswith(".") or part == "__MACOSX" for part in n.split("/"))}


def _labels(path: Path, paths: list[str], listing: bytes | None) -> tuple[Sequence[int] | None, tuple[str, ...]]:
    """Return a label per image (or None) and class names, from dataset.json if there is one, else from sub-folders."""
    if listing is not None:
        return _listed_labels(path, paths, listing), ()
    # a folder that wraps everything (as in many zip files) is no class
    common = posixpath.commonpath([posixpath.dirname(p) for p in paths]) if all("/" in p for p in paths) else ""
    inner = [posixpath.relpath(p, common) if common else p for p in paths]
    classes = sorted({p.split("/")[0] for p in inner})
    if len(classes) < 2 or not all("/" in p for p in inner):
        return None, ()
    number = {name: i for i, name in enumerate(classes)}
    return [number[p.split("/")[0]] for p in inner], tuple(classes)


def _listed_labels(path: Path, paths: list[str], listing: bytes) -> list[int] | None:
    """Read EDM's dataset.json: {"labels": [[path, class], ...]}, or null for no labels."""
    try:
        entries: Any = json.loads(listing)["labels"]
        if entries is None:
            return None
        table = {name.replace("\\", "/"): label for name, label in entries}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f'{path}: dataset.json must hold {{"labels": [["path", class], ...]}} or {{"labels": null}} '
            f"({one_line(error)})"
        ) from None
    for name in paths:
        if name not in table:
            raise UserError(f"{path}: dataset.json has no label for {name}; add it, or remove the image")
        if type(table[name]) is not int:
            raise UserError(f"{path}: dataset.json labels {name} {table[name]!r}; labels must be whole numbers")
    return [table[name] for name in paths]
