"""Decoding of image files to the pixels of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from .content import position
from .fitting import fit_image, reachable
from .image_files import ImageFiles
from .opening import decode, one_line
from .options import Options
from .processes import Answer, Processes, available
from .workers import workers

MANY = 256  # files from which on processes are worth their start

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]  # height, width


@dataclass(frozen=True)
class Loaded:
    """One image at the target size, if it can reach it.

    Attributes:
        pixels: uint8 (C, H, W), C = 1 or 3.
        found: (height, width) in the file.
        several, brightest: see `opening.Decoded`.
        position: see `content.position`; 0 if it is not wanted.
    """

    pixels: Pixels
    found: Size
    several: bool
    brightest: int | None
    position: float


def load(content: bytes, options: Options, *, positions: bool = True) -> Loaded:
    """Decode an image file and bring it to the size of the options.

    An image that cannot reach the size keeps its own: it is not a bad file.

    Raises:
        Exception: of many types, for a file that cannot be decoded.
    """
    size, fit = options.size, options.fit
    decoded = decode(content, options.max_pixels, size if fit in ("crop", "resize") else None)
    image, found = decoded.image, decoded.found
    if size is not None and reachable(found, size, fit):
        image = fit_image(image, size, fit, decoded.extent)
    pixels = planes(image)
    return Loaded(pixels, found, decoded.several, decoded.brightest, position(pixels) if positions else 0.0)


class Decoder:
    """Decodes image files by number: of many files in processes, one per core, else in the calling thread.

    Args:
        files: the files.
        options: how images are read.
        positions: whether the images' positions are wanted, a quarter of the work for small ones.
    """

    def __init__(self, files: ImageFiles, options: Options, *, positions: bool = True) -> None:
        self._files, self._options, self._positions = files, options, positions
        self._lock = Lock()
        self._processes: Processes | None = None

    def start(self) -> None:
        """Start the processes, if there are many files and they have not started: best in the program's main thread."""
        with self._lock:
            if self._processes is None and len(self._files.names) >= MANY and available():
                self._processes = Processes(partial(_answer, self._load), workers().number)

    def load(self, numbers: Sequence[int]) -> list[Loaded | str]:
        """Return the images of some files, or the reason why one cannot be read; called from several threads.

        Raises:
            MemoryError: if memory runs out.
            UserError: if a process that decodes images is killed.
        """
        self.start()
        if self._processes is None:
            return [self._load(number) for number in numbers]
        told, pixels = self._processes.ask([int(number) for number in numbers])
        found: list[Loaded | str] = []
        for one in told:
            if one is None:
                raise MemoryError
            if isinstance(one, str):
                found.append(one)
                continue
            shape, size, several, brightest, place = one
            count = math.prod(shape)
            found.append(Loaded(pixels[:count].reshape(shape), (size[0], size[1]), several, brightest, place))
            pixels = pixels[count:]
        return found

    def _load(self, number: int) -> Loaded | str:
        try:
            return load(self._files.read(number), self._options, positions=self._positions)
        except MemoryError:
            raise
        except Exception as error:  # Pillow and zipfile raise many exception types on broken files
            return one_line(error)


def _answer(load: Callable[[int], Loaded | str], numbers: Sequence[int]) -> Answer:
    """Return images as a process sends them: None where memory ran out."""
    told: list[Any] = []
    arrays = []
    for number in numbers:
        try:
            found = load(number)
        except MemoryError:
            told.append(None)
            continue
        if isinstance(found, str):
            told.append(found)
            continue
        told.append((found.pixels.shape, found.found, found.several, found.brightest, found.position))
        arrays.append(found.pixels)
    return told, arrays


def planes(image: Image.Image) -> Pixels:
    """Return an 8-bit grey or RGB image as an array (C, H, W)."""
    bands = image.getbands()
    content = b"".join(image.tobytes("raw", band) for band in bands)  # faster than a transposed copy
    return np.frombuffer(content, np.uint8).reshape(len(bands), image.height, image.width)


def coloured(pixels: Pixels, channels: int) -> Pixels:
    """Return grey pixels (1, H, W) repeated in `channels` channels; others unchanged."""
    return np.repeat(pixels, channels, axis=0) if len(pixels) < channels else pixels
