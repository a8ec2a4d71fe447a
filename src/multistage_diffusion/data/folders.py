"""Folders and zip files of images, with class labels from dataset.json or sub-folders."""

from __future__ import annotations

import io
import json
import os
import posixpath
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from .dataset import ImageData
from .fitting import Fit, fit_image, wrong_size

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

Progress = Callable[[int, int], None]
Pixels = npt.NDArray[np.uint8]

_BLOCK = 256  # files handed to the threads at a time, so that an error stops soon


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
        size: (height, width) wanted, or None for the images' own, which must then be equal.
        fit: how to reach size, see `fit_image`.
        skip_bad: leave out files that cannot be read, with one warning, instead of raising.
        progress: called with (files read, files in all).

    Raises:
        ValueError: naming the file, for unreadable or unequal images and missing labels; if there are no images.
    """
    with _files(path) as (names, read):
        paths = sorted(name for name in names if name.lower().endswith(SUFFIXES))
        if not paths:
            raise ValueError(f"{path}: holds no images ({', '.join(SUFFIXES)})")
        labels, class_names = _labels(path, paths, read("dataset.json") if "dataset.json" in names else None)

        def load(name: str) -> Pixels | str:
            try:
                image = decode(read(name))
                return np.asarray(image if size is None else fit_image(image, size, fit))
            except MemoryError:
                raise
            except Exception as error:  # Pillow and zipfile raise nearly every kind on broken files
                return _one_line(error)

        loaded = _load_all(path, paths, load, size, skip_bad, progress)
    kept = [i for i, pixels in enumerate(loaded) if pixels is not None]
    kept_labels = None if labels is None else np.array(labels, np.int64)[kept]
    return ImageData(_stack(loaded), kept_labels, str(path), class_names)


def decode(data: bytes) -> Image.Image:
    """Decode an image file to 8-bit grey ("L") or colour ("RGB"), upright, transparent parts white."""
    image: Image.Image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):  # 16-bit grey
        return Image.fromarray(((np.asarray(image).astype(np.int64) * 255 + 32767) // 65535).astype(np.uint8))
    grey = image.mode in ("1", "L", "LA")
    if image.mode in ("LA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("L" if grey else "RGB")


@contextmanager
def _files(path: Path) -> Iterator[tuple[set[str], Callable[[str], bytes]]]:
    """Yield the names of the visible files, relative with forward slashes, and a function that reads one."""
    if path.is_dir():
        yield _visible(_walk(path)), lambda name: (path / name).read_bytes()
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(f"{path}: not a readable zip file ({_one_line(error)})") from None
    with archive:
        yield _visible(archive.namelist()), archive.read


def _walk(root: Path) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: folder cannot be listed ({error.strerror})")

    for folder, children, files in os.walk(root, onerror=refuse, followlinks=True):
        # a link to one of its own ancestors would be followed for ever
        real = Path(os.path.realpath(folder))
        children[:] = [c for c in children if not real.is_relative_to(os.path.realpath(os.path.join(folder, c)))]
        yield from (Path(folder, file).relative_to(root).as_posix() for file in files)


def _visible(names: Iterator[str] | list[str]) -> set[str]:
    return {n for n in names if not any(part.startswith(".") or part == "__MACOSX" for part in n.split("/"))}


def _load_all(
    path: Path,
    names: list[str],
    load: Callable[[str], Pixels | str],
    size: tuple[int, int] | None,
    skip_bad: bool,
    progress: Progress | None,
) -> list[Pixels | None]:
    """Load in parallel; None stands for a file that was skipped."""
    loaded: list[Pixels | None] = []
    bad: list[str] = []
    first: tuple[str, tuple[int, int]] | None = None
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(names), _BLOCK):
            block = names[start : start + _BLOCK]
            for name, result in zip(block, pool.map(load, block), strict=True):
                if isinstance(result, str):
                    if not skip_bad:
                        raise ValueError(
                            f"{path}: {name} cannot be read ({result}); mend or remove it, or go on without such files "
                            f"with --skip-bad"
                        )
                    bad.append(f"{name} ({result})")
                    loaded.append(None)
                    continue
                first = first or (name, _size(result))
                _check_size(path, name, _size(result), size, first)
                loaded.append(result)
            if progress is not None:
                progress(len(loaded), len(names))
    if len(bad) == len(names):
        raise ValueError(f"{path}: none of its {len(names)} images can be read; the first is {bad[0]}")
    if bad:
        warnings.warn(f"{path}: skipped {len(bad)} of {len(names)} images; the first is {bad[0]}", stacklevel=3)
    return loaded


def _size(pixels: Pixels) -> tuple[int, int]:
    return pixels.shape[0], pixels.shape[1]


def _check_size(
    path: Path, name: str, found: tuple[int, int], size: tuple[int, int] | None, first: tuple[str, tuple[int, int]]
) -> None:
    if size is not None and found != tuple(size):
        raise wrong_size(str(path), name, found, size)
    if found != first[1]:
        (h0, w0), (h, w) = first[1], found
        raise ValueError(
            f"{path}: images differ in size: {first[0]} is {h0}x{w0} but {name} is {h}x{w} (height x width); "
            f"add --size H W --fit crop (or --fit resize)"
        )


def _stack(loaded: list[Pixels | None]) -> Pixels:
    """Gather (H, W) and (H, W, 3) images into (N, C, H, W), freeing them on the way."""
    good = [pixels for pixels in loaded if pixels is not None]
    loaded.clear()
    channels = 3 if any(pixels.ndim == 3 for pixels in good) else 1
    images = np.empty((len(good), channels, *_size(good[0])), np.uint8)
    good.reverse()
    for row in images:
        pixels = good.pop()
        row[:] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return images


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
        raise ValueError(
            f'{path}: dataset.json must hold {{"labels": [["path", class], ...]}} or {{"labels": null}} '
            f"({_one_line(error)})"
        ) from None
    for name in paths:
        if name not in table:
            raise ValueError(f"{path}: dataset.json has no label for {name}; add it, or remove the image")
        if type(table[name]) is not int:
            raise ValueError(f"{path}: dataset.json labels {name} {table[name]!r}; labels must be whole numbers")
    return [table[name] for name in paths]


def _one_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__
