"""Many image files to one array: decoded in parallel, brought to one size, bad ones named or left out."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..errors import UserError
from .fitting import Fit, fit_image, padded_content, reachable, wrong_size

Progress = Callable[[int, int], None]
Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]  # height, width

_BLOCK = 256  # files handed to the threads at a time, so that an error stops soon


@dataclass(frozen=True)
class Decoded:
    """Images that could be read.

    Attributes:
        images: uint8 (N, C, H, W), C = 1 if all are grey, else 3.
        kept: numbers of the files they come from, int64 (N,), ascending.
        content: as in `ImageData`.
    """

    images: Pixels
    kept: npt.NDArray[np.int64]
    content: Size | None


def decode_all(
    source: str,
    names: Sequence[str],
    read: Callable[[int], bytes],
    *,
    size: Size | None = None,
    fit: Fit = "exact",
    skip_bad: bool = False,
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
        progress: called with (files read, files in all).

    Raises:
        UserError: naming the file, for images that are unreadable, unequal or not to be brought to size.
    """

    def load(number: int) -> tuple[Pixels, Size] | str:
        try:
            image = decode(read(number))
            found = (image.height, image.width)
            # an image that cannot reach the size is no bad file: it is refused below, never skipped
            fitted = image if size is None or not reachable(found, size, fit) else fit_image(image, size, fit)
            return np.asarray(fitted), found
        except MemoryError:
            raise
        except Exception as error:  # Pillow and zipfile raise nearly every kind on broken files
            return one_line(error)

    loaded: dict[int, Pixels] = {}
    sizes: dict[Size, str] = {}  # every size met, with the first file that has it
    bad: list[str] = []
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
                loaded[number], found = result
                sizes.setdefault(found, names[number])
                _check_size(source, names[number], found, size, fit, sizes)
            if progress is not None:
                progress(block.stop, len(names))
    if not loaded:
        raise UserError(f"{source}: none of its {len(names)} images can be read; the first is {bad[0]}")
    if bad:
        warnings.warn(f"{source}: skipped {len(bad)} of {len(names)} images; the first is {bad[0]}", stacklevel=4)
    kept = np.array(list(loaded), np.int64)
    return Decoded(images=_stack(loaded), kept=kept, content=padded_content(sizes, size, fit))


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


def one_line(error: Exception) -> str:
    """Return the first line of what an exception says, or else its kind."""
    return (str(error).splitlines() or [""])[0].strip() or type(error).__name__


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
