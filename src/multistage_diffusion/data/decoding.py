"""Many image files to one array: decoded in parallel, brought to one size, bad ones named or left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..config.run import MAX_PIXELS
from ..errors import UserError
from .fitting import Fit, fit_image, padded_content, reachable, wrong_size
from .opening import decode, one_line

Progress = Callable[[int, int], None]
Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]  # height, width

UNREADABLE = "unreadable"

_FEWER_BITS = 14  # cameras and scanners give 10, 12 or 14 bits
_BLOCK = 256  # files handed to the threads at a time, so that an error stops soon


@dataclass(frozen=True)
class Decoded:
    """Images that could be read.

    Attributes:
        images: uint8 (N, C, H, W), C = 1 if all are grey, else 3.
        kept: numbers of the files they come from, int64 (N,), ascending.
        content: as in `ImageData`.
        passed_over: numbers of the other files, by reason.
    """

    images: Pixels
    kept: npt.NDArray[np.int64]
    content: Size | None
    passed_over: dict[str, int]


@dataclass(frozen=True)
class _Loaded:
    """One image brought to size, and what its file was like (see `opening.Decoded`)."""

    pixels: Pixels
    found: Size
    several: bool
    brightest: int | None


def decode_all(
    source: str,
    names: Sequence[str],
    read: Callable[[int], bytes],
    *,
    size: Size | None = None,
    fit: Fit = "exact",
    skip_bad: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
) -> Decoded:
    """Decode image files and bring them to one size.

    Args:
        source: what they belong to; starts every error message.
        names: what each file is called in messages.
        read: returns the bytes of a file, given its number; called from several threads.
        size: (height, width) wanted, or None for the images' own, which must then be equal.
        fit: how to reach size, see `fit_image`.
        skip_bad: leave out files that cannot be read, with one warning, instead of raising.
        max_pixels: larger images are refused as unreadable.
        progress: called with (files read, files in all).

    Raises:
        UserError: naming the file, for images that are unreadable, unequal or not to be brought to size.
    """

    def load(number: int) -> _Loaded | str:
        try:
            decoded = decode(read(number), max_pixels)
            image, found = decoded.image, (decoded.image.height, decoded.image.width)
            # an image that cannot reach the size is no bad file: it is refused below, never skipped
            fitted = image if size is None or not reachable(found, size, fit) else fit_image(image, size, fit)
            return _Loaded(np.asarray(fitted), found, decoded.several, decoded.brightest)
        except MemoryError:
            raise
        except Exception as error:  # Pillow and zipfile raise nearly every kind on broken files
            return one_line(error)

    loaded: dict[int, Pixels] = {}
    sizes: dict[Size, str] = {}  # every size met, with the first file that has it
    bad: list[str] = []
    several: list[str] = []
    brightest: list[int] = []
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(names), _BLOCK):
            block = range(start, min(start + _BLOCK, len(names)))
            for number, result in zip(block, pool.map(load, block), strict=True):
                if isinstance(result, str):
                    bad.append(f"{names[number]} ({result})")
                    if not skip_bad:
                        raise UserError(
                            f"{source}: {names[number]} cannot be read ({result}); mend or remove it, or go on without "
                            f"such files with --skip-bad"
                        )
                    continue
                loaded[number] = result.pixels
                sizes.setdefault(result.found, names[number])
                _check_size(source, names[number], result.found, size, fit, sizes)
                several += [names[number]] if result.several else []
                brightest += [] if result.brightest is None else [result.brightest]
            if progress is not None:
                progress(block.stop, len(names))
    if not loaded:
        raise UserError(f"{source}: none of its {len(names)} images can be read; the first is {bad[0]}")
    if bad:
        warnings.warn(f"{source}: skipped {len(bad)} of {len(names)} images; the first is {bad[0]}", stacklevel=4)
    _warn_of_several(source, several)
    _warn_of_dark(source, brightest)
    kept = np.array(list(loaded), np.int64)
    passed_over = {UNREADABLE: len(bad)} if bad else {}
    return Decoded(_stack(loaded), kept, padded_content(sizes, size, fit), passed_over)


def _warn_of_several(source: str, names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"{source}: {len(names)} files hold several images (frames or pages), of which the first is used; the first "
            f"such file is {names[0]}",
            stacklevel=5,
        )


def _warn_of_dark(source: str, brightest: Sequence[int]) -> None:
    """Warn where no image fills its 16 bits to a quarter: values of 10, 12 or 14 bits, not scaled, come out dark."""
    bits = max(brightest, default=1 << 16).bit_length()
    if bits <= _FEWER_BITS:
        warnings.warn(
            f"{source}: {len(brightest)} images are stored in 16 bits, but none has a value above {max(brightest)}, so no "
            f"pixel is brighter than {max(brightest) // 257} of 255; if they are {bits}-bit data, save them multiplied by "
            f"{1 << (16 - bits)}",
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
    """Gather (H, W) and (H, W, 3) images into (N, C, H, W), freeing them on the way."""
    channels = 3 if any(pixels.ndim == 3 for pixels in loaded.values()) else 1
    height, width = next(iter(loaded.values())).shape[:2]
    images = np.empty((len(loaded), channels, height, width), np.uint8)
    for row, number in zip(images, list(loaded), strict=True):
        pixels = loaded.pop(number)
        row[:] = pixels if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return images
