"""Folders and zip files of images, with class labels from dataset.json or sub-folders."""

from __future__ import annotations

import errno
import io
import os
import stat
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ...errors import UserError
from ...reading import read_file, require_length, require_regular
from ..bounded import FILE_LIMIT, read_member
from ..dataset import ImageData
from ..decoded import open_files
from ..image_files import FileTimes, ImageFiles, Stamps, file_times, read_unchanged, require_unchanged
from ..labels import find_labels, inner_path
from ..opening import SUFFIXES, one_line
from ..options import Options
from ..visible import LISTING, check_images, of_the_system, sort_out
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
        UserError: if there are no images, if labels are missing or wrong (see `find_labels`), and as `open_files`.
    """
    names, read = contents(path)
    found = sort_out(str(path), names)
    check_images(str(path), found)
    labels, class_names = find_labels(str(path), found.images, found.listings, read)
    files = _folder_files(path, found.images) if path.is_dir() else _archive_files(path, found.images, read)
    return open_files(files, labels, options, class_names, found.skipped)


Read = Callable[[str, int], bytes]  # reads the file of a name, up to a number of bytes


def contents(path: Path) -> tuple[list[str], Read]:
    """Return the file names of a folder or zip file (forward slashes), and what reads a file.

    Raises:
        UserError: if the folder or file cannot be read.
    """
    return _folder(path) if path.is_dir() else _archive(path)


def _folder(path: Path) -> tuple[list[str], Read]:
    """Return the relative file names (forward slashes) of a folder and what reads a file."""
    return list(_walk(path)), lambda name, limit: read_file(path / name, limit)


def _folder_files(path: Path, names: Sequence[str]) -> ImageFiles:
    """Return images of a folder; one that changes after this is an error when it is read."""
    places = [os.path.join(path, name) for name in names]
    times = [_times(place) for place in places]

    def read(number: int) -> bytes:
        before = times[number]
        if before is None:
            return read_file(Path(places[number]), FILE_LIMIT)
        require_length(before[0], FILE_LIMIT)
        return read_unchanged(places[number], before)

    known = [(name, found) for name, found in zip(names, times, strict=True) if found is not None]
    return ImageFiles(
        str(path), names, read, Stamps.of(str(path.resolve()), known) if len(known) == len(names) else None
    )


def _times(place: str) -> FileTimes | None:
    """Return the length and times of a regular file; None for anything else, which is told when it is read."""
    try:
        found = os.stat(place)
    except (OSError, ValueError):
        return None
    return file_times(found) if stat.S_ISREG(found.st_mode) else None


def _archive(path: Path) -> tuple[list[str], Read]:
    """Return the normalised names of a zip file's members and what reads a member; the file stays open with it."""
    try:
        require_regular(path)
        archive = zipfile.ZipFile(_OwnPlace(path))
    except Exception as error:  # zipfile raises many exception types on broken files
        raise UserError(f"{path}: not a readable zip file ({one_line(error)})") from None
    members = _members(path, archive)
    return list(members), lambda name, limit: read_member(archive, members[name], limit)


class _OwnPlace(io.RawIOBase):
    """A file that is open for reading at a place of its own in every process; what forked processes share is not used."""

    def __init__(self, path: Path) -> None:
        self._handle, self._place = os.open(path, os.O_RDONLY | os.O_CLOEXEC), 0

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            size = max(0, os.fstat(self._handle).st_size - self._place)
        content = os.pread(self._handle, size, self._place)
        self._place += len(content)
        return content

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: os.fstat(self._handle).st_size}[whence]
        if start + offset < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()


def _archive_files(path: Path, names: Sequence[str], read: Read) -> ImageFiles:
    """Return images of a zip file; if it changes after this, reading is an error."""
    times = file_times(path.stat())

    def read_image(number: int) -> bytes:
        content = read(names[number], FILE_LIMIT)
        require_unchanged(times, file_times(path.stat()))
        return content

    return ImageFiles(str(path), names, read_image, Stamps.of(str(path.resolve()), [(path.name, times)]))


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
    start = os.path.join(root, "")  # of every path; much faster than pathlib's, of many files
    while waiting:
        folder, way = waiting.pop()
        try:
            with os.scandir(folder) as found:
                entries = [(entry.path, entry.name, entry.is_dir(), entry.is_symlink()) for entry in found]
        except OSError as error:
            raise UserError(f"{folder}: folder cannot be listed ({error.strerror})") from None
        for path, name, is_folder, is_link in entries:
            if not is_folder or of_the_system(name):  # such folders may be closed to the user, and huge
                yield path[len(start) :].replace(os.sep, "/")
                continue
            real = os.path.realpath(path) if is_link else os.path.join(way[-1], name)
            # a link to a folder on the current path, or to a parent of one, would cause an endless loop
            if not (is_link and any(Path(passed).is_relative_to(real) for passed in way)):
                waiting.append((path, (*way, real)))


SOURCES.add("folders")(
    Files("a folder or .zip of images", lambda path: path.is_dir() or path.suffix.lower() == ".zip", open_images)
)
