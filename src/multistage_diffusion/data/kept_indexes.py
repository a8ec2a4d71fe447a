"""Indexes of image files, kept for the next opening in the cache folder."""

from __future__ import annotations

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL
from PIL import features
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..errors import UserError
from ..files import cache_folder, write_atomic, write_json
from ..reading import JSON_LIMIT, parse_json, read_text
from .content import Content
from .decoding import Pixels
from .image_files import ImageFiles
from .index import Index, Labels, make_index
from .opening import one_line
from .options import Options

WORTH = 1.0  # seconds that making an index takes at least if it is kept
SETTLED = 2 * 10**9  # nanoseconds; a file changed so shortly before could change again without a new time

_FORMAT = 1  # of the kept files; another number makes all of them again
_PARTS = 64  # fingerprints of parts that are kept of a data set
_DECODERS = ("jpg", "zlib", "webp", "libtiff", "jpg_2000", "avif")  # libraries of Pillow


@dataclass(frozen=True, eq=False)
class Found:
    """The index of image files.

    Attributes:
        index: the index.
        pixels: the images as one array, if they have been decoded and memory holds them.
        parts: fingerprints of parts of the data set; None: the index is not kept.
    """

    index: Index
    pixels: Pixels | None = None
    parts: PartFingerprints | None = None


class PartFingerprints:
    """Fingerprints of parts of a data set, kept beside its index: computing one decodes all images of the part.

    Args:
        path: the file, which may be missing.
        key: what the index depends on; fingerprints of another are forgotten.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self._key = path, key

    def fingerprint(self, part: npt.NDArray[np.int64], compute: Callable[[], str]) -> str:
        """Return the fingerprint of the rows `part`, from an earlier time or computed now."""
        known, name = self._read(), hashlib.sha256(part.astype("<i8").tobytes()).hexdigest()
        if name not in known:
            recent = dict(list(known.items())[1 - _PARTS :])
            known = {**recent, name: compute()}
            with suppress(OSError):  # the warning of the index is enough
                write_json(self.path, {"key": self._key, "parts": known, "sha256": self._digest(known)})
        return known[name]

    def _read(self) -> dict[str, str]:
        """Return what is kept; nothing if it is missing, damaged or of another index."""
        try:
            kept = parse_json(read_text(self.path, JSON_LIMIT), self.path)
            parts = {str(name): str(value) for name, value in kept["parts"].items()}
            return parts if kept["sha256"] == self._digest(parts) else {}
        except (UserError, AttributeError, KeyError, TypeError):
            return {}

    def _digest(self, parts: Mapping[str, str]) -> str:
        return hashlib.sha256(repr((self._key, sorted(parts.items()))).encode()).hexdigest()


def find_index(files: ImageFiles, labels: Labels | None, options: Options) -> Found:
    """Return the index of image files: that of an earlier opening, or a new one, for which all are decoded once.

    An index is kept in the cache folder if making it took a while. It is made again if it is damaged, or if names, lengths or
    times of files, labels, options or the decoder have changed.

    Args:
        files, labels, options: see `make_index`.

    Raises:
        UserError: as `make_index`.
    """
    opened = time.time_ns()
    stamps = files.stamps
    if stamps is None:
        return Found(*make_index(files, labels, options))
    path, key = _path(stamps.place, options), _key(stamps.digest, labels, options)
    known = _read(path, key)
    if known is not None:
        return Found(known, None, PartFingerprints(path.with_suffix(".json"), key))
    started = time.monotonic()
    index, pixels = make_index(files, labels, options)
    if time.monotonic() - started < WORTH or stamps.newest >= opened - SETTLED:
        return Found(index, pixels)
    _write(path, key, index)
    return Found(index, pixels, PartFingerprints(path.with_suffix(".json"), key))


def _path(place: str, options: Options) -> Path:
    """Return the file for the index of a data set; when the data set changes, its new index replaces the old one."""
    name = hashlib.sha256(repr((place, _facts(options))).encode("utf-8", "surrogateescape")).hexdigest()
    return cache_folder("indexes") / f"{name}.safetensors"


def _facts(options: Options) -> tuple[Any, ...]:
    size = None if options.size is None else tuple(options.size)
    return (size, options.fit, options.skip_bad, options.max_pixels)


def _key(stamps: str, labels: Labels | None, options: Options) -> str:
    """Return what an index depends on, as one SHA-256 in hex."""
    decoders = (PIL.__version__, *map(features.version, _DECODERS))
    own = None if labels is None else hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
    return hashlib.sha256(repr((_FORMAT, stamps, own, _facts(options), decoders)).encode()).hexdigest()


def _write(path: Path, key: str, index: Index) -> None:
    """Keep an index; if that fails, only warn, because it can be made again."""
    facts = {
        "shape": index.shape,
        "padded": index.padded,
        "skipped": index.skipped,
        "warnings": index.warnings,
        "fingerprint": index.content.fingerprint,
    }
    told = json.dumps(facts)
    arrays = {"kept": index.kept, "positions": index.content.positions}
    meta = {"key": key, "facts": told, "sha256": _digest(key, told, arrays)}
    try:
        write_atomic(path, save(arrays, metadata=meta))
    except (OSError, UserError) as error:
        why = getattr(error, "strerror", None) or error
        warnings.warn(
            f"{path}: the index of the images cannot be kept ({why}) and will be made again; set "
            "MSDIFF_CACHE to a folder with room",
            stacklevel=4,
        )


def _digest(key: str, facts: str, arrays: Mapping[str, npt.NDArray[Any]]) -> str:
    digest = hashlib.sha256(f"{key}\n{facts}\n".encode())
    for name in ("kept", "positions"):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _read(path: Path, key: str) -> Index | None:
    """Return the kept index; None if it is missing, of other files or options, or, with a warning, damaged."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            meta = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in ("kept", "positions")}
        if meta.get("sha256") != _digest(meta.get("key", ""), meta.get("facts", ""), arrays):
            raise ValueError("its content is not what was written")
        if meta["key"] != key:
            return None
        facts = json.loads(meta["facts"])
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        warnings.warn(f"{path}: damaged ({one_line(error)}); the index of the images is made again", stacklevel=4)
        return None
    channels, height, width = facts["shape"]
    padded = None if facts["padded"] is None else (int(facts["padded"][0]), int(facts["padded"][1]))
    content = Content(facts["fingerprint"], arrays["positions"])
    return Index(arrays["kept"], (channels, height, width), padded, facts["skipped"], tuple(facts["warnings"]), content)
