"""Rows of image files, decoded when they are drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from threading import Lock

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from .dataset import ImageData
from .decoding import Decoder, Loaded, Pixels, coloured
from .image_files import ImageFiles
from .kept_indexes import find_index
from .options import Options
from .rows import ArrayRows, Index, KeptRows, Rows, fits_memory
from .workers import task_size, workers

AHEAD = 128 << 20  # most bytes of pixels that one announcement decodes


def open_files(
    files: ImageFiles,
    labels: Sequence[int] | None,
    options: Options,
    class_names: tuple[str, ...] = (),
    skipped: Mapping[str, int] | None = None,
) -> ImageData:
    """Open image files as a data set.

    A small set is kept in memory once it is decoded; of a large one, each image is decoded when it is drawn.

    Args:
        files: the files.
        labels: class number of each file, or None.
        options: how images are read.
        class_names: see `ImageData`.
        skipped: number of other files that are not used, by reason.

    Raises:
        UserError: as `index.make_index`; and, when images are drawn, if a file has changed or can no longer be read.
    """
    given = None if labels is None else np.array(labels, np.int64)
    found = find_index(files, given, options)
    index, pixels = found.index, found.pixels
    index.warn()
    rows: Rows = DecodedRows(files, index.kept, index.shape, options) if pixels is None else ArrayRows(pixels)
    if pixels is None and fits_memory(len(rows), index.shape):
        rows = KeptRows(rows)
    own = None if given is None else given[index.kept]
    unused = {**(skipped or {}), **index.skipped}
    parts = None if found.parts is None else found.parts.fingerprint
    return ImageData(rows, own, files.source, class_names, index.padded, unused, index.content, parts)


class DecodedRows:
    """Image files as rows; each is decoded when it is drawn, on all cores.

    Args:
        files: the files.
        kept: numbers of those that are rows, int64 (N,).
        shape: (C, H, W) of every row; grey images are repeated in C channels.
        options: how images are read.
    """

    def __init__(self, files: ImageFiles, kept: Index, shape: tuple[int, int, int], options: Options) -> None:
        self._files, self._kept, self._shape = files, kept, shape
        self._decoder = Decoder(files, options, positions=False)
        self._begun: dict[int, tuple[Future[list[Pixels]], int]] = {}  # task of a row, and its place in the result
        self._lock = Lock()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of every row."""
        return self._shape

    def __len__(self) -> int:
        return len(self._kept)

    def prefetch(self, indices: Index) -> None:
        """Begin to decode rows in the background, see `rows.prefetch`; at most AHEAD bytes, the first of the rows."""
        most = max(1, AHEAD // math.prod(self._shape))
        with self._lock:
            if len(self._begun) > 2 * most:  # rows that were announced and never drawn
                for future, _ in self._begun.values():
                    future.cancel()
                self._begun.clear()
            self._begin(indices[:most])

    def rows(self, indices: Index) -> npt.NDArray[np.uint8]:
        """Return the rows at `indices`, see `Rows`.

        Raises:
            UserError: naming the file that has changed or can no longer be read.
        """
        wanted = indices.tolist()
        with self._lock:
            self._begin(indices)
            tasks = {row: self._begun.pop(row) for row in dict.fromkeys(wanted)}
        found = np.empty((len(wanted), *self._shape), np.uint8)
        for target, row in zip(found, wanted, strict=True):
            future, place = tasks[row]
            target[:] = future.result()[place]
        return found

    def _begin(self, rows: Index) -> None:
        """Submit tasks for the rows that have none."""
        self._decoder.start()
        missing = [int(row) for row in dict.fromkeys(rows.tolist()) if row not in self._begun]
        pool = workers()
        at_once = max(1, min(task_size(math.prod(self._shape)), -(-len(missing) // pool.number)))
        for start in range(0, len(missing), at_once):
            own = missing[start : start + at_once]
            future = pool.submit(partial(self._decode, own))
            self._begun.update((row, (future, place)) for place, row in enumerate(own))

    def _decode(self, rows: Sequence[int]) -> list[Pixels]:
        numbers = [int(self._kept[row]) for row in rows]
        return [self._checked(*one) for one in zip(numbers, self._decoder.load(numbers), strict=True)]

    def _checked(self, number: int, found: Loaded | str) -> Pixels:
        name, source = self._files.names[number], self._files.source
        if isinstance(found, str):
            raise UserError(f"{source}: {name} cannot be read any more ({found}); restore it and start again")
        pixels = coloured(found.pixels, self._shape[0])
        if pixels.shape != self._shape:
            now = f"{pixels.shape[1]}x{pixels.shape[2]}"
            raise UserError(
                f"{source}: {name} cannot be read any more (it has become {now}); restore it and start again"
            )
        return pixels
