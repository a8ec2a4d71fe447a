"""Selection of the image files in a folder or archive, with a reason for each unused file."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UserError
from ..escaping import counted
from .opening import SUFFIXES, supported

LISTING = "dataset.json"

HIDDEN, OTHERS, UNSUPPORTED = "hidden or system files", "not images", "in formats that this Pillow cannot read"
UNREAD = "in formats that are not read"
_UNREAD = frozenset({".heic", ".heif", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".psd", ".svg", ".jxl"})

# Files and folders that operating systems and network storage create, in lower case.
_SYSTEM = frozenset(
    {
        "__macosx",
        "$recycle.bin",
        "recycler",
        "system volume information",
        "lost+found",
        "@eadir",
        "@tmp",
        "@recycle",
        "@recently-snapshot",
        "#recycle",
        "#snapshot",
        "thumbs.db",
        "ehthumbs.db",
        "ehthumbs_vista.db",
        "desktop.ini",
        "icon\r",
    }
)


@dataclass(frozen=True)
class Sorted:
    """The files of a folder or archive.

    Attributes:
        images: paths of image files, sorted.
        listings: paths of files named dataset.json, sorted.
        skipped: number of the other files, by reason.
    """

    images: list[str]
    listings: list[str]
    skipped: dict[str, int]


def of_the_system(name: str) -> bool:
    """Return whether a file or folder of this name is hidden or created by an operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM


def sort_out(source: str, names: Iterable[str]) -> Sorted:
    """Select the images among files; warn about unused files that are not hidden.

    Args:
        source: folder or archive of the files; starts the warning.
        names: their paths with forward slashes. A hidden folder and all its content count as one file.
    """
    images, listings, hidden = [], [], set()
    others: dict[str, list[str]] = {OTHERS: [], UNSUPPORTED: [], UNREAD: []}
    for name in names:
        parts = name.split("/")
        covering = next((i for i, part in enumerate(parts) if of_the_system(part)), None)
        image_format = SUFFIXES.get(_suffix(parts[-1]))
        if covering is not None:
            hidden.add("/".join(parts[: covering + 1]))
        elif parts[-1] == LISTING:
            listings.append(name)
        elif image_format is None:
            others[UNREAD if _suffix(name) in _UNREAD else OTHERS].append(name)
        elif image_format in supported():
            images.append(name)
        else:
            others[UNSUPPORTED].append(name)
    for reason, found in others.items():
        if found:
            kinds = Counter(_suffix(name) or "no suffix" for name in found).most_common(5)
            told = ", ".join(f"{count} {kind}" for kind, count in kinds)
            mend = "; convert them to JPEG or PNG" if reason == UNREAD else ""
            warnings.warn(
                f"{source}: skipped {counted(len(found), 'file')}, {reason} ({told}); the first is {min(found)}{mend}",
                stacklevel=4,
            )
    counts = {HIDDEN: len(hidden), **{reason: len(found) for reason, found in others.items()}}
    return Sorted(sorted(images), sorted(listings), {reason: count for reason, count in counts.items() if count})


def check_images(source: str, found: Sorted) -> None:
    """Refuse a source without images, and say what it holds instead."""
    if not found.images:
        beside = "".join(f"; {counted(count, 'file')} passed over: {reason}" for reason, count in found.skipped.items())
        raise UserError(f"{source}: contains no images ({', '.join(SUFFIXES)}){beside}")


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rpartition("/")[2].rpartition(".")
    return f".{suffix.lower()}" if stem and dot else ""
