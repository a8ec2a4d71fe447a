"""Tar files of images, such as the shards of WebDataset, with class labels beside the images."""

from __future__ import annotations

import json
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...reading import brief, require_length, require_regular
from ..bounded import FILE_LIMIT
from ..dataset import ImageData
from ..decoded import open_files
from ..image_files import FileTimes, ImageFiles, Stamps, file_times, read_unchanged
from ..labels import find_labels, inner_path
from ..opening import SUFFIXES, one_line
from ..options import Options
from ..visible import LISTING, check_images, sort_out
from . import SOURCES, Files, Named, absolute, to_path

_LABEL_KEYS = ("label", "cls", "class")  # in a JSON file beside an image
_BESIDE = (".cls", ".json", ".txt")  # files of a sample that are no images
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_MOST_SHARDS = 100_000


@dataclass(frozen=True)
class _Member:
    """A file in a shard: number of the shard, position and length in bytes."""

    shard: int
    offset: int
    size: int


class _Shards:
    """The files of several tar files, none of which is unpacked.

    Attributes:
        paths: the tar files.
        members: their files by name; with several tar files, a name begins with that of its tar file.
        times: of the tar files; reading one that has changed is an error.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths
        self.members: dict[str, _Member] = {}
        self.times: list[FileTimes] = []
        for number, path in enumerate(paths):
            try:
                require_regular(path)
                self.times.append(file_times(path.stat()))
                self._list(number, path)
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            except Exception as error:  # tarfile raises many exception types on broken files
                raise UserError(f"{path}: not a readable, uncompressed tar file ({one_line(error)})") from None

    def _list(self, number: int, path: Path) -> None:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                if not member.isreg() or member.issparse():
                    continue
                name = inner_path(member.name)
                full = name if len(self.paths) == 1 else f"{path.name}/{name}"
                if full in self.members and _used(name):
                    raise UserError(f"contains two files named {name}; remove one from the archive")
                self.members[full] = _Member(number, member.offset_data, member.size)

    def plain(self, name: str) -> str:
        """Return a name without that of its tar file."""
        return name if len(self.paths) == 1 else name.partition("/")[2]

    def read(self, name: str, limit: int) -> bytes:
        """Return a file of at most `limit` bytes.

        Raises:
            UserError: the reason why it cannot be read; the caller names the file.
        """
        member = self.members[name]
        require_length(member.size, limit)
        return read_unchanged(str(self.paths[member.shard]), self.times[member.shard], member.offset, member.size)


def open_tar(path: Path, options: Options) -> ImageData:
    """Open the images in one tar file, sorted by path; see `open_shards`."""
    return _open(str(path), [path], options)


def open_shards(rest: str, options: Options) -> ImageData:
    """Open the images in several tar files, sorted by tar file, then by path.

    The label of an image is in the file of the same name that ends in .cls (a number) or .json (key label, cls or class), as
    WebDataset has it. If there is none, dataset.json or the folders in a tar file tell the classes, as in a zip file.

    Args:
        rest: a folder with .tar files, or their path with a range of numbers, as shards/train-{0000..0146}.tar.
        options: how images are read.

    Raises:
        UserError: if there are no tar files or images, a file is not a readable tar file, some images have labels and others
            have none, and as `open_files`.
    """
    title = f"webdataset:{rest}"
    paths = _expanded(title, rest)
    if not paths:
        raise UserError(
            f"data.source='{title}': no .tar files there; give webdataset:FOLDER or shards/{{000..012}}.tar"
        )
    return _open(title, paths, options)


def _expanded(title: str, rest: str) -> list[Path]:
    """Return the tar files that a folder, a path or a path with a range of numbers names."""
    match = _RANGE.search(rest)
    if match is None:
        path = to_path(rest)
        return sorted(path.glob("*.tar")) if path.is_dir() else [path] if rest and path.exists() else []
    first, last = int(match[1]), int(match[2])
    if not 0 <= last - first < _MOST_SHARDS:
        raise UserError(f"data.source='{title}': {match[0]} must be a range of at most {_MOST_SHARDS} numbers")
    numbers = (f"{number:0{len(match[1])}d}" for number in range(first, last + 1))
    return [to_path(f"{rest[: match.start()]}{number}{rest[match.end() :]}") for number in numbers]


def _open(title: str, paths: Sequence[Path], options: Options) -> ImageData:
    shards = _Shards(paths)
    keys = {_key(name) for name in shards.members if _is_image(name)}
    beside = {name for name in shards.members if name.endswith(_BESIDE) and _key(name) in keys}
    found = sort_out(title, (name for name in shards.members if name not in beside))
    check_images(title, found)
    labels, names = _labels(title, shards, found.images, found.listings)
    known = [(str(path.resolve()), times) for path, times in zip(paths, shards.times, strict=True)]
    files = ImageFiles(
        title, found.images, lambda number: shards.read(found.images[number], FILE_LIMIT), Stamps.of(title, known)
    )
    return open_files(files, labels, options, names, found.skipped)


def _labels(
    title: str, shards: _Shards, images: Sequence[str], listings: Sequence[str]
) -> tuple[Sequence[int] | None, tuple[str, ...]]:
    found = [_label(title, shards, name) for name in images]
    unlabelled = [name for name, label in zip(images, found, strict=True) if label is None]
    if not unlabelled:
        return [label for label in found if label is not None], ()
    if len(unlabelled) < len(images):
        raise UserError(
            f"{title}: {unlabelled[0]} has no label in a file {_key(unlabelled[0])}.cls or .json, but others have; add it, or "
            "remove the image"
        )
    if len(shards.paths) == 1:
        return find_labels(title, images, listings, shards.read)
    return find_labels(title, [shards.plain(name) for name in images], (), shards.read)


def _label(title: str, shards: _Shards, image: str) -> int | None:
    """Return the label in the file beside an image; None if there is none."""
    key = _key(image)
    for suffix in (".cls", ".json"):
        name = f"{key}{suffix}"
        if name not in shards.members:
            continue
        try:
            told = _told(shards.read(name, 1 << 20), suffix)
        except (UserError, ValueError, RecursionError) as error:
            raise UserError(f"{title}: {name} cannot be read as a label ({one_line(error)})") from None
        if told is not None:
            return told
    return None


def _told(content: bytes, suffix: str) -> int | None:
    value: Any = json.loads(content)
    if suffix == ".json":
        known: Mapping[str, Any] = value if isinstance(value, dict) else {}
        value = next((known[key] for key in _LABEL_KEYS if key in known), None)
        if value is None:
            return None
    if type(value) is not int:
        raise ValueError(f"it is {brief(value)}, no whole number")
    return value


def _key(name: str) -> str:
    """Return the name of a sample: up to the first dot of the file's name."""
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _is_image(name: str) -> bool:
    return name.lower().endswith(tuple(SUFFIXES))


def _used(name: str) -> bool:
    return _is_image(name) or name.endswith(_BESIDE) or name.rpartition("/")[2] == LISTING


def _located(rest: str) -> str:
    """Return REST with its path made absolute; of a path with a range, that of the folder."""
    match = _RANGE.search(rest)
    if match is None:
        return absolute(rest)
    folder, _, name = rest.rpartition("/")
    return f"{absolute(folder or '.')}/{name}" if _RANGE.search(name) else rest


SOURCES.add("tar")(Files("a .tar of images", lambda path: path.suffix.lower() == ".tar" and path.is_file(), open_tar))
SOURCES.add("webdataset")(Named("webdataset:FOLDER", open_shards, _located))
