"""Opening of a data set by name or path."""

from __future__ import annotations

import difflib
import logging
from pathlib import Path
from typing import get_args

import numpy as np

from ..config.run import MAX_PIXELS, DataConfig
from ..errors import UserError
from ..progress import Progress
from ..reading import require_regular
from .arrays import open_array
from .cifar import open_cifar10
from .dataset import ImageData
from .fitting import Fit, fit_array, padded_content
from .folders import open_images
from .hub import open_hub
from .idx import open_fashion_mnist
from .opening import one_line

_LOG = logging.getLogger(__name__)

KNOWN = ("digits", "fashion-mnist", "cifar10")
_FORMS = "digits, fashion-mnist[:FOLDER], cifar10:FOLDER, hf:NAME[:SPLIT], a folder or .zip of images, .npy, .npz"


def open_data(
    source: str | Path,
    *,
    size: tuple[int, int] | None = None,
    fit: Fit = "exact",
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> ImageData:
    """Open a data set.

    Args:
        source: "digits" (scikit-learn's 1797 scans, 8x8), "fashion-mnist" or "fashion-mnist:FOLDER" (idx files; without
            a folder those of Debian's package), "cifar10:FOLDER" (the binary version, unpacked or its .tar.gz),
            "hf:NAME" or "hf:NAME:SPLIT" (the library `datasets`; NAME may be a folder), a folder or .zip of images, a
            .npy or .npz file. A known name takes precedence over a folder of the same name; write "./digits" (or a
            Path) for the folder.
        size: (height, width) that the images must have or are converted to; None: their own.
        fit: "exact" (raise if an image has another size), "crop" (scale, then keep the centre), "resize", or "pad"
            (unscaled on black).
        skip_bad: skip unreadable image files with one warning instead of raising.
        max_pixels: images with more pixels count as unreadable.
        progress: called with (files read, total files) while a folder, zip file or "hf:" data set is read.

    Returns:
        The images, uint8 (N, C, H, W) with C = 1 or 3 and N > 0, and labels if the source has them.

    Raises:
        UserError: one line with the source (and file), the fault and how to fix it.
    """
    if size is not None and min(size) <= 0:
        raise UserError(f"data.size={size} must be positive")
    if fit not in get_args(Fit):
        raise UserError(f"data.fit={fit!r} must be one of {', '.join(get_args(Fit))}")
    if size is None and fit != "exact":
        raise UserError(f"data.fit={fit!r} needs data.size; add --size H W")
    if isinstance(source, str) and source.startswith("hf:"):
        name, _, split = source.removeprefix("hf:").partition(":")  # a split may hold colons: train[:1000]
        return open_hub(name, split, size=size, fit=fit, skip_bad=skip_bad, max_pixels=max_pixels, progress=progress)
    known = _open_known(source) if isinstance(source, str) else None
    if known is not None:
        return _fitted(known, size, fit)
    path = _existing(source)
    suffix = path.suffix.lower()
    if path.is_dir() or suffix == ".zip":
        return open_images(path, size=size, fit=fit, skip_bad=skip_bad, max_pixels=max_pixels, progress=progress)
    if suffix in (".npy", ".npz"):
        return _fitted(open_array(path), size, fit)
    raise UserError(f"data.source='{source}' is not a data set; known: {_FORMS}")


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
    word, colon, rest = source.partition(":")
    if source in KNOWN:
        return source
    if word not in (*KNOWN, "hf"):
        word, colon, rest = "", "", source  # all of it is a path
    folder, split_colon, split = rest.partition(":") if word == "hf" else (rest, "", "")
    path = _path(folder)
    return f"{word}{colon}{path.resolve()}{split_colon}{split}" if folder and path.exists() else source


def _open_known(source: str) -> ImageData | None:
    """Open a data set of KNOWN; return None for any other source."""
    word, colon, folder = source.partition(":")
    if source == "digits":
        return _open_digits()
    if word not in ("fashion-mnist", "cifar10"):
        return None
    path = _path(folder) if folder else None
    if word == "cifar10":
        return open_cifar10(path)
    if colon and path is None:
        raise UserError(f"data.source={source!r}: no folder after the colon; write fashion-mnist or add the folder")
    return open_fashion_mnist(path)


def _open_digits() -> ImageData:
    """Open scikit-learn's digits, scaled from 0..16 to 0..255."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("data.source='digits' needs scikit-learn: pip install 'multistage-diffusion[demo]'") from None
    bunch = load_digits()
    images = np.round(bunch.images * (255.0 / 16.0)).astype(np.uint8)
    return ImageData(images[:, None], bunch.target.astype(np.int64), "digits", tuple("0123456789"))


def _existing(source: str | Path) -> Path:
    path = _path(source)
    if path.is_dir():
        return path
    if path.exists():
        try:
            require_regular(path)
        except UserError as error:
            raise UserError(f"data.source='{source}': cannot be read ({error}); known: {_FORMS}") from None
        return path
    near = difflib.get_close_matches(str(source).lower(), KNOWN, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"data.source='{source}': no such file or folder, nor a known data set; {hint}known: {_FORMS}")


def _path(source: str | Path) -> Path:
    """Return a valid path with a home folder (~) expanded; `exists` does not raise on it."""
    try:
        path = Path(source).expanduser()
        path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # name too long; unknown user's home
        raise UserError(f"data.source='{source}': is no path ({one_line(error)}); known: {_FORMS}") from None
    return path


def _fitted(data: ImageData, size: tuple[int, int] | None, fit: Fit) -> ImageData:
    images = fit_array(data.images, size, fit, data.name)
    content = padded_content([data.shape[1:]], size, fit)
    return ImageData(images, data.labels, data.name, data.class_names, content)
