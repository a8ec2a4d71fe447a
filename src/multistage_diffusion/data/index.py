"""The index of image files: what one pass over all of them finds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..escaping import counted
from ..progress import reading
from .content import Content, Fingerprint, content_of, position
from .decoding import Decoder, Loaded, Pixels, Size, coloured
from .fitting import padded_content, reachable, wrong_size
from .image_files import ImageFiles
from .options import Options, SizesDifferError
from .rows import fits_memory
from .workers import each, task_size

Labels = npt.NDArray[np.int64]

UNREADABLE = "unreadable"
_NAMED = 5  # files that a warning names

_FEWER_BITS = 14  # cameras and scanners give 10, 12 or 14 bits


@dataclass(frozen=True, eq=False)
class Index:
    """What is known of the image files of a data set.

    Attributes:
        kept: numbers of the files that are used, int64 (N,), ascending.
        shape: (C, H, W) of every image, C = 1 if all are grey, else 3.
        padded: (height, width) of the centred unpadded part, if all images were padded from one size; else None.
        skipped: number of the other files, by reason.
        warnings: what is wrong with some files, a line each.
        content: of the images that are used, and their labels.
    """

    kept: npt.NDArray[np.int64]
    shape: tuple[int, int, int]
    padded: Size | None
    skipped: dict[str, int]
    warnings: tuple[str, ...]
    content: Content

    def warn(self) -> None:
        """Repeat the warnings."""
        for message in self.warnings:
            warnings.warn(message, stacklevel=4)


def make_index(files: ImageFiles, labels: Labels | None, options: Options) -> tuple[Index, Pixels | None]:
    """Decode all image files once.

    Args:
        files: the files.
        labels: of all files, or None.
        options: how images are read. Without a size, all images must have the same.

    Returns:
        The index; and the images as one array, if memory holds them (see `fits_memory`), else None.

    Raises:
        UserError: if an image is unreadable, differs in size or cannot reach the size (naming the file), or if no image is
            readable.
    """
    decoder = Decoder(files, options)
    decoder.start()
    state = _Reading(files, options, decoder)
    total = len(files.names)
    with reading(options.progress) as progress:
        number = 0
        while number < total and not state.kept:  # the first image tells how large the tasks are
            state.add(number, decoder.load([number])[0])
            number += 1
        rest = range(number, total)
        for number, result in zip(rest, each(decoder.load, rest, state.at_once()), strict=True):
            state.add(number, result)
            progress(number + 1, total)
        if not rest:
            progress(total, total)
    return state.finish(labels)


class _Reading:
    """What is found while the files are decoded one after the other.

    The fingerprint is computed on the way, as if all files were images of the first one's channels. If they are not, all
    images are read again for it, at the end.
    """

    def __init__(self, files: ImageFiles, options: Options, decoder: Decoder) -> None:
        self.files, self.options, self.decoder = files, options, decoder
        self.kept: list[int] = []
        self.sizes: dict[Size, str] = {}  # each original size, with the first file that has it
        self.bad: list[str] = []
        self.several: list[str] = []
        self.brightest: list[int] = []
        self.positions: list[float] = []
        self.shape = (0, 0, 0)
        self.pixels: Pixels | None = None  # all images, if memory holds them
        self.fingerprint: Fingerprint | None = None

    def at_once(self) -> int:
        """Return how many images make a task."""
        return task_size(math.prod(self.shape))

    def add(self, number: int, result: Loaded | str) -> None:
        """Add what became of a file: its image, or why it cannot be read."""
        name, source = self.files.names[number], self.files.source
        if isinstance(result, str):
            self.bad.append(f"{name} ({result})")
            self.fingerprint = None
            if not self.options.skip_bad:
                raise UserError(
                    f"{source}: {name} cannot be read ({result}); repair or remove it, or add --skip-bad to skip such files"
                )
            return
        self.sizes.setdefault(result.found, name)
        self._check_size(name, result.found)
        if not self.kept:
            self._begin(result)
        self._keep(result)
        self.kept.append(number)
        self.several += [name] if result.several else []
        self.brightest += [] if result.brightest is None else [result.brightest]

    def _begin(self, first: Loaded) -> None:
        channels, height, width = first.pixels.shape
        self.shape, count = (channels, height, width), len(self.files.names)
        if fits_memory(count, self.shape):
            self.pixels = np.empty((count, *self.shape), np.uint8)
        if not self.bad:
            self.fingerprint = Fingerprint(count, self.shape)

    def _keep(self, image: Loaded) -> None:
        if len(image.pixels) > self.shape[0]:
            self._become_coloured()
        pixels = coloured(image.pixels, self.shape[0])
        self.positions.append(image.position if pixels is image.pixels else position(pixels))
        if self.fingerprint is not None:
            self.fingerprint.add(pixels)
        if self.pixels is not None:
            self.pixels[len(self.kept)] = pixels

    def _become_coloured(self) -> None:
        """Go on in colour, after grey images."""
        grey, self.shape, self.fingerprint = self.pixels, (3, *self.shape[1:]), None
        self.pixels = None
        if grey is not None and fits_memory(len(grey), self.shape):
            self.pixels = np.empty((len(grey), *self.shape), np.uint8)
            self.pixels[: len(self.kept)] = grey[: len(self.kept)]

    def _check_size(self, name: str, found: Size) -> None:
        source, size, fit = self.files.source, self.options.size, self.options.fit
        if size is not None:
            if not reachable(found, size, fit):
                raise wrong_size(source, name, found, size, fit)
            return
        if len(self.sizes) > 1:
            (h0, w0), first = next(iter(self.sizes.items()))
            raise SizesDifferError(
                f"{source}: images differ in size: {first} is {h0}x{w0} but {name} is {found[0]}x{found[1]} (height x "
                f"width); add --size H W --fit crop (or --fit resize, or --fit pad)"
            )

    def finish(self, labels: Labels | None) -> tuple[Index, Pixels | None]:
        """Return the index, and the images if memory holds them."""
        source, total = self.files.source, len(self.files.names)
        if not self.kept:
            raise UserError(f"{source}: none of its {total} images can be read; the first is {self.bad[0]}")
        kept = np.array(self.kept, np.int64)
        own = None if labels is None else labels[kept]
        pixels = None if self.pixels is None else self.pixels[: len(kept)]
        padded = padded_content(self.sizes, self.options.size, self.options.fit)
        skipped = {UNREADABLE: len(self.bad)} if self.bad else {}
        content = self._content(kept, own, pixels)
        return Index(kept, self.shape, padded, skipped, tuple(self._warnings()), content), pixels

    def _content(self, kept: npt.NDArray[np.int64], labels: Labels | None, pixels: Pixels | None) -> Content:
        if self.fingerprint is not None:
            return Content(self.fingerprint.finish(labels), np.array(self.positions, np.float64))
        if pixels is not None:
            return content_of([pixels], len(kept), self.shape, labels)
        with reading(self.options.progress) as progress:
            done = 0

            def again() -> Iterator[Pixels]:
                nonlocal done
                for number, found in zip(self.kept, each(self.decoder.load, self.kept, self.at_once()), strict=True):
                    if isinstance(found, str):
                        raise UserError(
                            f"{self.files.source}: {self.files.names[number]} cannot be read any more ({found})"
                        )
                    yield coloured(found.pixels, self.shape[0])[None]
                    done += 1
                    progress(done, len(kept))

            return content_of(again(), len(kept), self.shape, labels)

    def _warnings(self) -> list[str]:
        source, found = self.files.source, []
        if self.bad:
            found.append(f"{source}: skipped {len(self.bad)} of {len(self.files.names)} images: {_listed(self.bad)}")
        if self.several:
            found.append(
                f"{source}: several images (frames or pages) in {counted(len(self.several), 'file')}; the first of each is used; "
                f"the first such file is {self.several[0]}"
            )
        # if all 16-bit images stay below a quarter of the range, they hold unscaled 10-, 12- or 14-bit values: dark images
        bits = max(self.brightest, default=1 << 16).bit_length()
        if bits <= _FEWER_BITS:
            found.append(
                f"{source}: no value of its {len(self.brightest)} 16-bit images is above {max(self.brightest)}, which is "
                f"{max(self.brightest) // 257} of 255 in 8 bits; if they hold {bits}-bit data, multiply them by "
                f"{1 << (16 - bits)}"
            )
        return found


def _listed(files: Sequence[str]) -> str:
    """Return the first of some files, and how many more there are."""
    more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
    return ", ".join(files[:_NAMED]) + more
