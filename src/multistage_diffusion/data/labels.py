"""Class labels of image files, from EDM's dataset.json or from sub-folders."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import UserError
from .bounded import LISTING_LIMIT
from .opening import one_line

_LABEL_LIMIT = 1 << 31  # rejects absurd numbers only; ImageData checks the range of the labels


def find_labels(
    source: str, images: Sequence[str], listings: Sequence[str], read: Callable[[str, int], bytes]
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Return a label per image (or None) and class names, from dataset.json if present, else from sub-folders.

    Args:
        source: the folder or archive; starts every error message.
        images: paths of its images.
        listings: paths of all its files named dataset.json.
        read: returns the bytes of a file, given its path and a byte limit.

    Raises:
        UserError: if there are several dataset.json files, one is in a folder that does not hold all images, or one is
            invalid or lacks an image.
    """
    if not listings:
        return _folder_labels(images)
    listing = _one_above_all(source, images, listings)
    try:
        content = read(listing, LISTING_LIMIT)
    except Exception as error:  # zipfile raises many exception types on broken files
        raise UserError(
            f"{source}: {listing} cannot be read ({one_line(error)}); repair it, or remove it to use sub-folders as classes"
        ) from None
    return _listed_labels(f"{source}: {listing}", posixpath.dirname(listing), images, content)


def _one_above_all(source: str, images: Sequence[str], listings: Sequence[str]) -> str:
    """Return the only dataset.json; its folder must hold all images."""
    for listing in listings:
        folder = posixpath.dirname(listing)
        outside = next((name for name in images if folder and not name.startswith(f"{folder}/")), None)
        if outside is not None:
            raise UserError(
                f"{source}: {listing} is not in a folder that contains all images ({outside} is outside); move it to the "
                "images' common folder, or remove it"
            )
    if len(listings) > 1:
        raise UserError(f"{source}: contains {' and '.join(listings[:3])}; keep the one that labels the images")
    return listings[0]


def _folder_labels(images: Sequence[str]) -> tuple[list[int] | None, tuple[str, ...]]:
    # a single folder around all images (as in many zip files) is not a class
    common = posixpath.commonpath([posixpath.dirname(p) for p in images]) if all("/" in p for p in images) else ""
    inner = [posixpath.relpath(p, common) if common else p for p in images]
    classes = sorted({p.split("/")[0] for p in inner})
    if len(classes) < 2 or not all("/" in p for p in inner):
        return None, ()
    number = {name: i for i, name in enumerate(classes)}
    return [number[p.split("/")[0]] for p in inner], tuple(classes)


def _listed_labels(
    where: str, folder: str, images: Sequence[str], content: bytes
) -> tuple[list[int] | None, tuple[str, ...]]:
    """Read {"labels": [[path, class], ...]} with paths relative to the listing's folder; null means no labels.

    The file may have the names of the classes, {"class_names": [name, ...]}, as those of `msdiff pack` do.
    """
    try:
        found = json.loads(content, object_pairs_hook=_no_key_twice)
        entries = found["labels"]
        if entries is None:
            return None, ()
        names = _names(found.get("class_names", []))
        pairs = [_pair(entry) for entry in _list(entries)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f'{where} must be {{"labels": [["path", class], ...]}} or {{"labels": null}} ({one_line(error)})'
        ) from None
    table: dict[str, Any] = {}
    for name, label in pairs:
        path = inner_path(f"{folder}/{name}")
        if path in table:
            raise UserError(f"{where} labels {name} twice, {table[path]!r} and {label!r}; keep one")
        table[path] = label
    for name in images:
        if name not in table:
            raise UserError(f"{where} has no label for {name}; add it, or remove the image")
        label = table[name]
        if type(label) is not int or not -_LABEL_LIMIT < label < _LABEL_LIMIT:
            raise UserError(f"{where}: label of {name} is {str(label)[:40]}; labels must be integers from 0")
    return [table[name] for name in images], names


def inner_path(name: str) -> str:
    """Return the normalised path inside a folder or archive: forward slashes, no `.`; `..` never leaves the root."""
    return posixpath.normpath(f"/{name}".replace("\\", "/")).lstrip("/")


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in found if keys.count(key) > 1)!r}")
    return found


def _names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"class_names is no list of names: {str(names)[:40]}")
    return tuple(names)


def _list(entries: Any) -> list[Any]:
    if not isinstance(entries, list):
        raise TypeError(f"labels is no list: {str(entries)[:40]}")
    return entries


def _pair(entry: Any) -> tuple[str, Any]:
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
        raise TypeError(f"no [path, class] pair: {str(entry)[:40]}")
    return entry[0], entry[1]
