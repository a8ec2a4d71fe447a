"""Folders and zip files of images, with class labels from dataset.json or sub-folders."""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ...errors import UserError
from ...reading import read_file, require_regular
from ..bounded import FILE_LIMIT, read_member
from ..dataset import ImageData
from ..decoding import decode_all
from ..labels import find_labels, inner_path
from ..opening import SUFFIXES, one_line
from ..options import Options
from ..visible import LISTING, of_the_system, sort_out
from . import SOURCES, Files


def open_images(path: Path, options: Options) -> ImageData:
    """Open all images in a folder (with sub-folders) or a zip file, sorted by path.

    All formats of `opening.SUFFIXES` are read. Grey images, including those with a grey palette, have one channel. If
    any image is in colour, all become RGB. Transparent parts become white. EXIF orientation is applied. Of several
    frames or pages the first is used, with a warning. Hidden files and system files (Thumbs.db, __MACOSX, @eaDir, ...)
    are skipped. Other files that are not images are skipped with a warning.

    Args:
        path: an existing folder or zip file (never unpacked to disk).
        options: how images are read.

    Raises:
        UserError: if there are no images, if labels are missing or wrong (see `find_labels`), and as `decode_all`.
    """
    with files(path) as (names, read):
        found = sort_out(str(path), names)
        if not found.images:
            raise UserError(f"{path}: contains no images ({', '.join(SUFFIXES)})")
        labels, class_names = find_labels(str(path), found.images, found.listings, read)
        decoded = decode_all(str(path), found.images, lambda number: read(found.images[number], FILE_LIMIT), options)
    kept_labels = None if labels is None else np.array(labels, np.int64)[decoded.kept]
    skipped = {**found.skipped, **decoded.skipped}
    return ImageData(decoded.images, kept_labels, str(path), class_names, decoded.content, skipped)


@contextmanager
def files(path: Path) -> Iterator[tuple[list[str], Callable[[str, int], bytes]]]:
    """Yield the relative file names (forward slashes) and a function that reads one file up to a byte limit."""
    if path.is_dir():
        yield list(_walk(path)), lambda name, limit: read_file(path / name, limit)
        return
    try:
        require_regular(path)
        archive = zipfile.ZipFile(path)
    except Exception as error:  # zipfile raises many exception types on broken files
        raise UserError(f"{path}: not a readable zip file ({one_line(error)})") from None
    with archive:
        members = _members(path, archive)
        yield list(members), lambda name, limit: read_member(archive, members[name], limit)


def _members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return an archive's files by normalised path; some Windows tools write backslashes as separators."""
    files = [(inner_path(m.filename), m) for m in archive.infolist() if not m.filename.endswith(("/", "\\"))]
    names = Counter(name for name, _ in files)
    for name, count in names.items():
        used = name.lower().endswith(tuple(SUFFIXES)) or name.rpartition("/")[2] == LISTING
        if count > 1 and used:
            raise UserError(f"{path}: contains {count} files named {name}; remove all but one from the archive")
    return dict(files)


def _walk(root: Path) -> Iterator[str]:
    """Yield the files below a folder, following links; a hidden or system folder yields only its own name."""
    waiting: list[tuple[str, tuple[str, ...]]] = [(str(root), (os.path.realpath(root),))]
    while waiting:
        folder, way = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = [(entry.path, entry.name, entry.is_dir(), entry.is_symlink()) for entry in found]
        except OSError as error:
            raise UserError(f"{folder}: folder cannot be listed ({error.strerror})") from None
        for path, name, is_folder, is_link in entries:
            if not is_folder or of_the_system(name):  # such folders may be closed to the user, and huge
                yield Path(path).relative_to(root).as_posix()
                continue
            real = os.path.realpath(path) if is_link else os.path.join(way[-1], name)
            # a link to a folder on the current path, or to a parent of one, would cause an endless loop
            if not (is_link and any(Path(passed).is_relative_to(real) for passed in way)):
                waiting.append((path, (*way, real)))


SOURCES.add("folders")(
    Files("a folder or .zip of images", lambda path: path.is_dir() or path.suffix.lower() == ".zip", open_images)
)
