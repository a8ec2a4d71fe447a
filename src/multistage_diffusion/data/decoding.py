"""Decoding of many image files in parallel into one array of one image size."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .fitting import fit_image, padded_content, reachable, require_pixels, wrong_size
from .opening import decode, one_line
from .options import Fit, Options

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]  # height, width

UNREADABLE = "unreadable"

_FEWER_BITS = 14  # cameras and scanners give 10, 12 or 14 bits
_BLOCK = 256  # files per submission to the thread pool; an error stops the decoding after at most one block


@dataclass(frozen=True)
class Decoded:
    """The images that could be decoded.

    Attributes:
        images: uint8 (N, C, H, W), C = 1 if all are grey, else 3.
        kept: indices of their files, int64 (N,), ascending.
        content: as in `ImageData`.
        skipped: number of the other files, by reason.
    """

    images: Pixels
    kept: npt.NDArray[np.int64]
    content: Size | None
    skipped: dict[str, int]


@dataclass(frozen=True)
class _Loaded:
    """One image at the target size, its original size and the properties of its file (see `opening.Decoded`)."""

    pixels: Pixels
    found: Size
    several: bool
    brightest: int | None


def decode_all(source: str, names: Sequence[str], read: Callable[[int], bytes], options: Options) -> Decoded:
    """Decode image files and bring them to one size.

    Args:
        source: data set of the files; starts every error message.
        names: name of each file in messages.
        read: returns the bytes of the file with a given index; called from several threads.
        options: how images are read. Without a size, all images must have the same.

    Raises:
        UserError: if an image is unreadable, differs in size or cannot reach the size (naming the file), or if no image
            is readable.
    """
    size, fit = options.size, options.fit

    def load(number: int) -> _Loaded | str:
        try:
            decoded = decode(read(number), options.max_pixels)
            image, found = decoded.image, (decoded.image.height, decoded.image.width)
            # an image that cannot reach the size is not a bad file: _check_size raises, skip_bad never skips it
            fitted = image if size is None or not reachable(found, size, fit) else fit_image(image, size, fit)
            return _Loaded(np.asarray(fitted), found, decoded.several, decoded.brightest)
        except MemoryError:
            raise
        except Exception as error:  # Pillow and zipfile raise many exception types on broken files
            return one_line(error)

    loaded: dict[int, Pixels] = {}
    sizes: dict[Size, str] = {}  # each original size, with the first file that has it
    bad: list[str] = []
    several: list[str] = []
    brightest: list[int] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(names), _BLOCK):
            block = range(start, min(start + _BLOCK, len(names)))
            for number, result in zip(block, pool.map(load, block), strict=True):
                if isinstance(result, str):
                    bad.append(f"{names[number]} ({result})")
                    if not options.skip_bad:
                        raise UserError(
                            f"{source}: {names[number]} cannot be read ({result}); repair or remove it, or add "
                            f"--skip-bad to skip such files"
                        )
                    continue
                if not loaded:
                    height, width = result.pixels.shape[:2]
                    require_pixels(len(names), result.pixels.size // (height * width), (height, width))
                loaded[number] = result.pixels
                sizes.setdefault(result.found, names[number])
                _check_size(source, names[number], result.found, size, fit, sizes)
                several += [names[number]] if result.several else []
                brightest += [] if result.brightest is None else [result.brightest]
            if options.progress is not None:
                options.progress(block.stop, len(names))
    if not loaded:
        raise UserError(f"{source}: none of its {len(names)} images can be read; the first is {bad[0]}")
    if bad:
        warnings.warn(f"{source}: skipped {len(bad)} of {len(names)} images; the first is {bad[0]}", stacklevel=4)
    _warn_of_several(source, several)
    _warn_of_dark(source, brightest)
    kept = np.array(list(loaded), np.int64)
    skipped = {UNREADABLE: len(bad)} if bad else {}
    return Decoded(_stack(loaded), kept, padded_content(sizes, size, fit), skipped)


def _warn_of_several(source: str, names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"{source}: {len(names)} files contain several images (frames or pages); the first of each is used; the first "
            f"such file is {names[0]}",
            stacklevel=5,
        )


def _warn_of_dark(source: str, brightest: Sequence[int]) -> None:
    """Warn if all 16-bit images stay below a quarter of the range: unscaled 10-, 12- or 14-bit values become dark."""
    bits = max(brightest, default=1 << 16).bit_length()
    if bits <= _FEWER_BITS:
        warnings.warn(
            f"{source}: no value of its {len(brightest)} 16-bit images is above {max(brightest)}, which is "
            f"{max(brightest) // 257} of 255 in 8 bits; if they hold {bits}-bit data, multiply them by {1 << (16 - bits)}",
            stacklevel=5,
        )


def _check_size(source: str, name: str, found: Size, size: Size | None, fit: Fit, sizes: dict[Size, str]) -> None:
    if size is not None:
        if not reachable(found, size, fit):
            raise wrong_size(source, name, found, size, fit)
        return
    if len(sizes) > 1:
        (h0, w0), first = next(iter(sizes.items()))
        raise UserError(
            f"{source}: images differ in size: {first} is {h0}x{w0} but {name} is {found[0]}x{found[1]} (height x "
            f"width); add --size H W --fit crop (or --fit resize, or --fit pad)"
        )


def _stack(loaded: dict[int, Pixels]) -> Pixels:
    """Stack (H, W) and (H, W, 3) images into (N, C, H, W); each image is freed once it is copied."""
    channels = 3 if any(pixels.ndim == 3 for pixels in loaded.values()) else 1
    height, width = next(iter(loaded.values())).shape[:2]
    images = np.empty((len(loaded), channels, height, width), np.uint8)
    for row, number in zip(images, list(loaded), strict=True):
        pixels = loaded.pop(number)
        row[:] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return images
