"""Opening of a data set by name or path. Each module of this package adds one kind of source to SOURCES."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ...config.run import MAX_PIXELS, DataConfig
from ...errors import UserError
from ...progress import Progress
from ...reading import require_regular
from ...registry import Registry
from ..dataset import ImageData
from ..opening import SUFFIXES
from ..options import Fit, Options
from ..rows import Rows, fits_memory

T = TypeVar("T")
_LOG = logging.getLogger(__name__)
_CONFIGURATIONS = (".json", ".yaml", ".yml")
_COMPRESSED = (".gz", ".tgz", ".bz2", ".tbz2", ".xz", ".txz", ".zst", ".7z", ".rar")


def absolute(path: str) -> str:
    """Return the absolute form of a path that exists; return any other text unchanged."""
    found = to_path(path)
    return str(found.resolve()) if path and found.exists() else path


@dataclass(frozen=True)
class Named:
    """A source that a user chooses by its name in SOURCES, alone or followed by a colon and more: NAME, NAME:REST.

    Attributes:
        form: how a user writes it, for help and error messages, e.g. "cifar10:FOLDER".
        open: opens it, given REST ("" without a colon). Images of another size than the options' are fitted afterwards.
        located: returns REST with its path made absolute, because a run may be used from other folders.
    """

    form: str
    open: Callable[[str, Options], ImageData]
    located: Callable[[str], str] = absolute


@dataclass(frozen=True)
class Files:
    """A source that is a path.

    Attributes:
        form: what it is, for help and error messages, e.g. "a folder of images".
        recognises: whether an existing file or folder is of this kind.
        open: opens it. Images of another size than the options' are fitted afterwards.
    """

    form: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path, Options], ImageData]


SOURCES: Registry[Named | Files] = Registry("data.source", __name__)


def open_data(
    source: str | Path | DataConfig,
    *,
    size: tuple[int, int] | None = None,
    fit: Fit = "exact",
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> ImageData:
    """Open a data set.

    Args:
        source: a name (docs/own-images.md lists them), or the path of a folder or file. A name takes precedence over a
            folder of the same name; write "./digits" (or a Path) for the folder. Or a configuration, with all options.
        size, fit, skip_bad, max_pixels, progress: see `Options`.

    Returns:
        The images, uint8 (N, C, H, W) with C = 1 or 3 and N > 0, and labels if the source has them.

    Raises:
        UserError: one line with the source (and file), the fault and how to fix it.
    """
    if isinstance(source, DataConfig):
        return open_configured(source, progress)
    options = Options(size=size, fit=fit, skip_bad=skip_bad, max_pixels=max_pixels, progress=progress)
    found = _named(source)
    if found is not None:
        named, rest = found
        if str(source).endswith(":") and not rest:
            raise UserError(f"data.source={source!r}: nothing follows the colon; write {named.form}")
        return _fitted(named.open(rest, options), options)
    path = _existing(source)
    for kind in _all(Files).values():
        if kind.recognises(path):
            return _fitted(kind.open(path, options), options)
    raise UserError(f"data.source='{source}': {_instead(path)}")


def _instead(path: Path) -> str:
    """Return why a file is not a data set, and what a user may have meant."""
    if path.name.lower().endswith(_COMPRESSED):
        return "archives of this kind are not read; unpack it and give the folder"
    if path.suffix.lower() in SUFFIXES:
        return f"is one image; give the folder of all images, such as {path.parent}"
    if path.suffix.lower() in _CONFIGURATIONS:
        return f"holds no images; a configuration is given by msdiff train --config {path}"
    return f"not a data set; known: {forms()}"


def open_configured(config: DataConfig, progress: Progress | None = None) -> ImageData:
    """Open the data set of a configuration and check it against the recorded shape and fingerprint.

    Logs one line about the data (`ImageData.describe`), which commands print.

    Raises:
        UserError: as `open_data`, and if a recorded fingerprint or shape differs.
    """
    data = open_data(
        config.source,
        size=config.size,
        fit=config.fit,
        skip_bad=config.skip_bad,
        max_pixels=config.max_pixels,
        progress=progress,
    )
    _LOG.info(data.describe())
    if config.shape and tuple(config.shape) != data.shape:
        raise UserError(
            f"data.shape={list(config.shape)} is recorded, but {data.name} now has images of shape {list(data.shape)}; "
            f"restore the data or start a new run"
        )
    if config.fingerprint and config.fingerprint != data.fingerprint:
        raise UserError(
            f"data.fingerprint={config.fingerprint} is recorded, but {data.name} now has {data.fingerprint}; "
            f"restore the data or start a new run"
        )
    return data


def located(source: str) -> str:
    """Return a source with its path made absolute if it exists, because a run may be used from other folders."""
    found = _named(source)
    if found is None:
        return absolute(source)
    named, rest = found
    return f"{source.partition(':')[0]}:{named.located(rest)}" if rest else source


def require_source(source: str) -> None:
    """Raise UserError if a source is neither a kind of source by name nor an existing path."""
    if _named(source) is None:
        _existing(source)


def is_folder_or_zip(source: str) -> bool:
    """Return whether a source is an existing folder or zip file of images, whose sizes may differ."""
    return _named(source) is None and (to_path(source).is_dir() or to_path(source).suffix.lower() == ".zip")


def forms() -> str:
    """Return how a user writes each source, separated by commas."""
    return ", ".join([named.form for named in _all(Named).values()] + [files.form for files in _all(Files).values()])


def to_path(text: str | Path) -> Path:
    """Return a path with the home folder (~) expanded; `exists` does not raise on it.

    Raises:
        UserError: if it is not a valid path.
    """
    try:
        path = Path(text).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # name too long; unknown user's home
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"data.source={str(text)[:80]!r}: not a valid path ({reason}); known: {forms()}") from None
    return path


def _all(kind: type[T]) -> dict[str, T]:
    """Return the sources of one kind by name, in alphabetical order."""
    sources = {name: SOURCES[name] for name in sorted(SOURCES)}
    return {name: source for name, source in sources.items() if isinstance(source, kind)}


def _named(source: str | Path) -> tuple[Named, str] | None:
    """Return the source that a text names, and what follows the colon; None for a path."""
    name, _, rest = str(source).partition(":")
    named = None if isinstance(source, Path) else _all(Named).get(name)
    return None if named is None else (named, rest)


def _existing(source: str | Path) -> Path:
    path = to_path(source)
    if path.is_dir():
        return path
    if path.exists():
        try:
            require_regular(path)
        except UserError as error:
            raise UserError(f"data.source='{source}': cannot be read ({error}); known: {forms()}") from None
        return path
    near = difflib.get_close_matches(str(source).lower(), _all(Named), 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"data.source='{source}': no file, folder or data set of this name; {hint}known: {forms()}")


def _fitted(data: ImageData, options: Options) -> ImageData:
    """Return data of the size that the options ask for."""
    size, found = options.size, data.shape[1:]
    if size is None or found == tuple(size):
        return data
    from ..fitting import FittedRows, fit_rows, padded_content, reachable  # imports Pillow

    images: Rows | npt.NDArray[np.uint8]
    if fits_memory(len(data), (data.shape[0], *size)) or not reachable(found, size, options.fit):
        images = fit_rows(data, size, options.fit, data.name)
    else:
        images = FittedRows(data, size, options.fit)
    content = padded_content([found], size, options.fit)
    return ImageData(images, data.labels, data.name, data.class_names, content, data.skipped)
