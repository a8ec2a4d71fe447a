"""Decoding of one image file to 8-bit pixels: supported formats and pixel conversions."""

from __future__ import annotations

import io
import logging
import os
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from ..config.run import MAX_PIXELS
from ..errors import UserError
from ..reading import read_file
from .bounded import FILE_LIMIT

# The formats that Pillow decodes in this process and recognises by their first bytes. EPS is excluded because Pillow
# runs Ghostscript for it, whatever the file name.
SUFFIXES = {
    ".png": "PNG",
    ".apng": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".mpo": "JPEG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".avifs": "AVIF",
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
    ".jpf": "JPEG2000",
    ".jpx": "JPEG2000",
    ".jpc": "JPEG2000",
    ".j2c": "JPEG2000",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".pbm": "PPM",
    ".pnm": "PPM",
    ".qoi": "QOI",
}
FORMATS = tuple(dict.fromkeys(SUFFIXES.values()))

_LINE = 200  # characters; zipfile, for example, quotes whole members
_ORIENTATION, _PHOTOMETRIC, _SAMPLE_FORMAT = 0x0112, 0x0106, 0x0153  # tags of EXIF and TIFF
_SIGNED = 2  # a value of _SAMPLE_FORMAT
_WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LYING = (5, 6, 7, 8)  # orientations that exchange height and width
_DRAFTS = (8, 4, 2)  # how much smaller the decoder of JPEG can make an image

# Without a handler, Python would print Pillow's log messages about a damaged file beside our own message.
logging.getLogger("PIL").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Decoded:
    """The first image of a file.

    Attributes:
        image: 8-bit grey ("L") or colour ("RGB"), upright, transparent parts white.
        found: (height, width) of the upright image in the file; larger than `image` if that was decoded smaller.
        extent: (height, width) of `found` in pixels of `image`: its size, or a fraction of a pixel less.
        several: whether the file holds further images (frames of an animation, pages).
        brightest: the largest value, of any channel, of the visible pixels of a 16-bit image (not of those that are
            fully transparent); None for fewer bits, or if no pixel is visible. If Pillow keeps only the upper bytes (as
            for colour), it is 256 * byte + 255 for the largest byte.
    """

    image: Image.Image
    found: tuple[int, int]
    extent: tuple[float, float]
    several: bool
    brightest: int | None


@cache
def supported() -> frozenset[str]:
    """Return the FORMATS that the installed Pillow can open."""
    Image.init()
    return frozenset(FORMATS) & frozenset(Image.OPEN)


def open_image(source: bytes | Path, formats: Sequence[str] = FORMATS, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Open an image in one of the given formats, whatever its name, without decoding it.

    Raises:
        UserError: the reason why it cannot be opened; the caller adds the file name.
    """
    content = source if isinstance(source, bytes) else read_file(source, FILE_LIMIT)
    known = [name for name in formats if name in supported()]
    try:
        with _own_limit:
            image = Image.open(io.BytesIO(content), formats=known)
    except UnidentifiedImageError:
        raise UserError(f"it is not recognised as {' or '.join(known)}" if content else "it is empty") from None
    pixels = image.width * image.height
    if pixels > max_pixels:
        raise UserError(
            f"it has {pixels} pixels, more than data.max_pixels={max_pixels}; allow it with --max-pixels {pixels}"
        )
    return image


def load_png(source: bytes | Path, name: str, mend: str) -> Image.Image:
    """Return a decoded PNG image, grey or RGB, from a file that this package is expected to have written.

    Args:
        source: its bytes or its file.
        name: its name in the error message.
        mend: advice for the error message.

    Raises:
        UserError: naming the image, if it is not a readable PNG image.
    """
    try:
        image = open_image(source, ("PNG",), max_pixels=1 << 62)
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"it has {image.width} x {image.height} pixels")
        with _own_limit:
            image.load()
        return _eight_bits(image)
    except Exception as error:  # Pillow raises many exception types on damaged files
        raise UserError(f"{name}: is not a readable PNG image ({one_line(error)}); {mend}") from None


def one_line(error: Exception) -> str:
    """Return the first line of an exception's message (its class name if empty), cut after 200 characters."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    line = (text.splitlines() or [""])[0].strip() or type(error).__name__
    line = re.sub(r"<(?:\w+\.)*(\w+) object at 0x[0-9a-f]+>", r"a \1", line)  # a memory address is of no use
    return line if len(line) <= _LINE else f"{line[:_LINE]} ..."


class _OwnLimit:
    """Disables Pillow's process-wide pixel limit while at least one thread uses it."""

    def __init__(self) -> None:
        self._lock, self._users, self._before = threading.Lock(), 0, Image.MAX_IMAGE_PIXELS

    def renew(self) -> None:
        """Forget the threads of the process that forked this one."""
        if self._users:
            self._users, Image.MAX_IMAGE_PIXELS = 0, self._before
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                Image.MAX_IMAGE_PIXELS = self._before


_own_limit = _OwnLimit()
os.register_at_fork(after_in_child=_own_limit.renew)


def decode(content: bytes, max_pixels: int, least: tuple[int, int] | None = None) -> Decoded:
    """Decode the first image of a file of one of FORMATS.

    Args:
        content: of the file.
        max_pixels: images with more pixels are refused.
        least: (height, width) to which the upright image will be reduced. A JPEG image is then decoded to a half, a quarter
            or an eighth of its size, which is faster, if that leaves at least twice as many pixels in either direction.
            None: it is decoded whole.

    Raises:
        UserError: for another format, more pixels than max_pixels, or pixels of unknown range (floating point, 32-bit).
        Exception: of many types, from Pillow, for damaged files.
    """
    image = open_image(content, max_pixels=max_pixels)
    height, width = image.height, image.width
    drafted = 1 if least is None else _draft(image, least)
    several = image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: a photo and previews
    tiles = repr(getattr(image, "tile", ""))
    deep, grey = image.mode.startswith("I") or ";16" in tiles, "'LA;16" in tiles  # Pillow opens the latter as colour
    with _own_limit:
        _load(image)
    _require_known_range(image)
    upright = _upright(image)
    found = (upright.height, upright.width) if drafted == 1 else _turned((height, width), image)
    extent = (found[0] / drafted, found[1] / drafted)
    if upright.mode.startswith("I"):
        eight, brightest = _from_sixteen_bits(upright, image)
        return Decoded(eight, found, extent, several, brightest)
    if deep and isinstance(image.info.get("transparency"), tuple):
        raise UserError(
            "it has 16-bit colours with one transparent colour; convert it to 8 bits, or to an alpha channel"
        )
    eight = _eight_bits(upright)
    eight = eight.convert("L") if grey else eight
    brightest = _largest_byte(upright, eight) if deep else None  # Pillow kept only the upper byte of each value
    return Decoded(eight, found, extent, several, None if brightest is None else brightest * 256 + 255)


def _draft(image: Image.Image, least: tuple[int, int]) -> int:
    """Let a JPEG image be decoded to a half, a quarter or an eighth of its size; return 2, 4 or 8, or 1 if it is not.

    The decoder then computes fewer coefficients of its cosine transform. Two pixels for one that is wanted are left, in
    either direction, for the resampling that follows. The size of an image that is also turned must be divisible, because
    the last column of others would be less than a pixel wide, and turned to another side.
    """
    if not isinstance(image, JpegImageFile) or len(image.tile) != 1:
        return 1
    height, width = _turned(least, image)
    room = min(image.width // (2 * width), image.height // (2 * height))
    straight = _orientation(image) not in _UPRIGHT
    for factor in _DRAFTS:
        if factor <= room and (straight or not (image.width % factor or image.height % factor)):
            image.draft(None, (image.width // factor, image.height // factor))
            return factor
    return 1


def _turned(size: tuple[int, int], image: Image.Image) -> tuple[int, int]:
    """Return (height, width) after, or before, an image is turned upright."""
    return size[::-1] if _orientation(image) in _LYING else size


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1 (upright) if its EXIF data are unreadable."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # Pillow raises many exception types on bad EXIF data; the pixels are still good
        return 1


def _load(image: Image.Image) -> None:
    try:
        image.load()
    except ZeroDivisionError:
        # Pillow rotates a TIFF after decoding and fails on an EXIF fraction n/0; the decoded pixels stay
        image.load()


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; leave the image unchanged if its EXIF data are unreadable."""
    turn = _UPRIGHT.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _require_known_range(image: Image.Image) -> None:
    # Pillow uses mode "I" for 16-bit grey PPM, and in early releases also for 16-bit grey PNG
    if (
        image.mode == "F"
        or (image.mode == "I" and image.format not in ("PNG", "PPM"))
        or _SIGNED in _sample_formats(image)
    ):
        numbers = "floating-point numbers" if image.mode == "F" else "signed or 32-bit integers"
        raise UserError(f"its pixels are {numbers} of unknown range; convert them to 8 bits (0..255)")


def _sample_formats(image: Image.Image) -> tuple[int, ...]:
    """Return what a TIFF says its numbers are, of each channel; () for other formats."""
    tags = getattr(image, "tag_v2", None)
    found = () if tags is None else tags.get(_SAMPLE_FORMAT, ())
    return tuple(found) if isinstance(found, tuple) else (found,)


def _from_sixteen_bits(image: Image.Image, opened: Image.Image) -> tuple[Image.Image, int | None]:
    """Return a 16-bit grey image in 8 bits, and the largest of its visible values; None if no value is visible."""
    values = np.asarray(image).astype(np.uint32)
    tags = getattr(opened, "tag_v2", None)
    if tags is not None and tags.get(_PHOTOMETRIC) == 0:  # 0 is white; Pillow inverts only 8 bits
        values = 65535 - values
    clear = opened.info.get("transparency")  # one value that is transparent
    visible = values != clear if isinstance(clear, int) else np.ones(values.shape, bool)
    pixels = np.where(visible, (values * 255 + 32767) // 65535, 255).astype(np.uint8)
    return Image.fromarray(pixels), int(values[visible].max()) if visible.any() else None


def _largest_byte(image: Image.Image, eight: Image.Image) -> int | None:
    """Return the largest byte of the pixels that are not fully transparent; None if there is none.

    Args:
        image: the decoded image, perhaps with an alpha channel.
        eight: the same without alpha.
    """
    if image.mode not in _WITH_ALPHA:
        return int(np.asarray(eight).max())
    pixels = np.asarray(image.convert("RGBA"))
    visible = pixels[pixels[..., 3] > 0]
    return int(visible[:, :3].max()) if len(visible) else None


def _eight_bits(image: Image.Image) -> Image.Image:
    grey = image.mode in ("1", "L", "LA", "La")
    palette = image.mode in ("P", "PA")
    if image.mode in _WITH_ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    wanted = "L" if grey else "RGB"
    image = image if image.mode == wanted else image.convert(wanted)
    if palette:  # pngquant and GIF tools write grey images with a palette of grey colours
        red, green, blue = (np.asarray(band) for band in image.split())
        if np.array_equal(red, green) and np.array_equal(red, blue):
            return image.getchannel(0)
    return image
