"""Rows of a data set, read by index: from an array, from a file, or through a view of other rows."""

from __future__ import annotations

import itertools
import math
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import UserError
from ..memory import available_memory, require_memory
from ..progress import reading

Index = npt.NDArray[np.int64]

LEAST_DRAWN = 16  # images that memory must hold at a time
IN_MEMORY = 1 << 30  # bytes of the largest set of decoded images, or of latents, that is kept in memory
_AT_ONCE = 256  # rows read at a time where all are read


class Rows(Protocol):
    """Rows of one shape and type: uint8 images, or float32 latents.

    A data set that does not fit into memory is a class with these three members.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of every row."""

    def __len__(self) -> int: ...

    def rows(self, indices: Index) -> npt.NDArray[Any]:
        """Return the rows at `indices`, each in 0..len - 1, in any order and with repeats.

        Returns:
            A new C-contiguous array (n, C, H, W); n = 0 is allowed.
        """


class ArrayRows:
    """The rows of an array (N, C, H, W) of any memory layout.

    Attributes:
        array: the array.
    """

    def __init__(self, array: npt.NDArray[Any]) -> None:
        self.array = array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of every row."""
        return self.array.shape[1:]

    def __len__(self) -> int:
        return len(self.array)

    def rows(self, indices: Index) -> npt.NDArray[Any]:
        """Return the rows at `indices`, see `Rows`."""
        return np.ascontiguousarray(self.array[indices])


class FileRows:
    """Rows that a file stores one after another; read from the file on access.

    The file is not mapped into memory: its pages would count as memory of the process, and a file that is cut short would
    end the process.

    Args:
        path: the file, which stays open.
        offset: position of the first row in bytes.
        count: number of rows.
        shape: shape of a row in the file, (C, H, W), or (H, W, C) if channels_last.
        channels_last: whether the channels are the last axis in the file.
        dtype: type of the values, in this machine's order of bytes.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        count: int,
        shape: tuple[int, int, int],
        *,
        channels_last: bool = False,
        dtype: npt.DTypeLike = np.uint8,
    ) -> None:
        self.path, self._offset, self._count = path, offset, count
        self._stored, self._channels_last, self._dtype = shape, channels_last, np.dtype(dtype)
        file = path.open("rb", buffering=0)
        self._handle = file.fileno()
        self._written = self._last_written()
        weakref.finalize(self, file.close)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of every row."""
        return (self._stored[2], *self._stored[:2]) if self._channels_last else self._stored

    def __len__(self) -> int:
        return self._count

    def rows(self, indices: Index) -> npt.NDArray[Any]:
        """Return the rows at `indices`, see `Rows`.

        Raises:
            UserError: if the file cannot be read, or has been written since it was opened.
        """
        if self._last_written() != self._written:
            raise UserError(
                f"{self.path}: has been written since it was opened; restore it, or start again with a new run"
            )
        found = np.empty((len(indices), *self._stored), self._dtype)
        starts = [*np.flatnonzero(np.diff(indices, prepend=-2) != 1).tolist(), len(indices)]
        for start, stop in itertools.pairwise(starts):  # consecutive rows are read at once
            self._fill(found[start:stop].reshape(-1).data.cast("B"), int(indices[start]))
        return np.ascontiguousarray(found.transpose(0, 3, 1, 2)) if self._channels_last else found

    def _last_written(self) -> int:
        return os.fstat(self._handle).st_mtime_ns

    def _fill(self, target: memoryview, first: int) -> None:
        place = self._offset + first * math.prod(self._stored) * self._dtype.itemsize
        while target:
            try:
                size = os.preadv(self._handle, [target], place)
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read ({error.strerror or error})") from None
            if not size:
                raise UserError(f"{self.path}: has become shorter since it was opened; restore it and start again")
            target, place = target[size:], place + size


class _Around:
    """What rows that are made of others, one of each, have in common.

    Args:
        source: the others.
    """

    def __init__(self, source: Rows) -> None:
        self.source = source

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of every row."""
        return self.source.shape

    def __len__(self) -> int:
        return len(self.source)


class ScaledRows(_Around):
    """Rows times a factor.

    Args:
        source: rows of float values.
        factor: what each value is multiplied by.
    """

    def __init__(self, source: Rows, factor: float) -> None:
        super().__init__(source)
        self.factor = factor

    def rows(self, indices: Index) -> npt.NDArray[Any]:
        """Return the rows at `indices`, see `Rows`."""
        found = self.source.rows(indices)
        found *= np.asarray(self.factor, found.dtype)
        return found


class View:
    """Some rows of others, by index; nothing is copied. A view of a view reads the rows of the first directly.

    Args:
        source: the rows.
        index: which of them, int64 (n,), each in 0..len(source) - 1.
    """

    def __init__(self, source: Rows, index: Index) -> None:
        self.source: Rows = source.source if isinstance(source, View) else source
        self.index: Index = source.index[index] if isinstance(source, View) else index

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape (C, H, W) of every row."""
        return self.source.shape

    def __len__(self) -> int:
        return len(self.index)

    def rows(self, indices: Index) -> npt.NDArray[Any]:
        """Return the rows at `indices` of the view, see `Rows`."""
        return self.source.rows(self.index[indices])

    def prefetch(self, indices: Index) -> None:
        """Begin to read rows of the view, see `prefetch`."""
        prefetch(self.source, self.index[indices])


class KeptRows(_Around):
    """Rows that are kept in memory once they have been read.

    Args:
        source: the rows.
    """

    def __init__(self, source: Rows) -> None:
        super().__init__(source)
        self._known = np.zeros(len(source), bool)
        self._array = np.empty((len(source), *source.shape), row_type(source))  # takes no memory before it is written

    def rows(self, indices: Index) -> npt.NDArray[Any]:
        """Return the rows at `indices`, see `Rows`."""
        self._read(indices)
        return self._array[indices]

    def prefetch(self, indices: Index) -> None:
        """Begin to read rows, see `prefetch`."""
        prefetch(self.source, self._missing(indices))

    def array(self) -> npt.NDArray[Any]:
        """Return the array that holds all rows; the missing ones are read first."""
        with reading() as told:
            for start in range(0, len(self), _AT_ONCE):
                stop = min(start + _AT_ONCE, len(self))
                self.prefetch(np.arange(stop, min(stop + _AT_ONCE, len(self))))
                self._read(np.arange(start, stop))
                told(stop, len(self))
        return self._array

    def _read(self, indices: Index) -> None:
        missing = self._missing(indices)
        if len(missing):
            self._array[missing] = self.source.rows(missing)
            self._known[missing] = True  # last: another thread may read meanwhile

    def _missing(self, indices: Index) -> Index:
        return np.unique(indices[~self._known[indices]])


def prefetch(rows: object, indices: Index) -> None:
    """Begin to read rows that will be asked for soon, in the background; rows that cost nothing to read ignore it."""
    begin = getattr(rows, "prefetch", None)
    if begin is not None and len(indices):
        begin(indices)


def fits_memory(count: int, shape: Sequence[int]) -> bool:
    """Return whether `count` uint8 images of this shape (C, H, W) are kept in memory; else each is decoded when drawn.

    Raises:
        UserError: naming the size, if memory does not hold even the few that are drawn at a time.
    """
    height, width = shape[-2:]
    require_memory(
        min(count, LEAST_DRAWN) * math.prod(shape),
        f"data.size={height}x{width} for {count} images",
        "give a smaller --size, or fewer images",
    )
    return stay_in_memory(count * math.prod(shape))


def stay_in_memory(size: int) -> bool:
    """Return whether rows of so many bytes in all are kept in memory; else they are read when they are drawn."""
    return size <= min(IN_MEMORY, available_memory() // 4)


def as_rows(data: Rows | npt.NDArray[Any] | Tensor) -> Rows:
    """Return an array or a tensor on the CPU, (N, C, H, W), as rows that share its memory; return rows unchanged."""
    if isinstance(data, Tensor):
        data = data.numpy()
    return ArrayRows(data) if isinstance(data, np.ndarray) else data


def row_type(rows: Rows) -> np.dtype[Any]:
    """Return the type of the rows' values."""
    return rows.rows(np.empty(0, np.int64)).dtype


def chunks(rows: Rows, at_once: int) -> Iterator[npt.NDArray[Any]]:
    """Yield all rows in order, `at_once` at a time."""
    for start in range(0, len(rows), at_once):
        next_start = start + at_once
        prefetch(rows, np.arange(next_start, min(next_start + at_once, len(rows))))
        yield rows.rows(np.arange(start, min(next_start, len(rows))))


def batches(data: Tensor | Rows, at_once: int) -> Iterator[Tensor]:
    """Yield all rows in order, `at_once` at a time, as tensors: on a tensor's own device, else on the CPU."""
    if isinstance(data, Tensor):
        yield from torch.split(data, at_once)
    else:
        yield from map(torch.from_numpy, chunks(data, at_once))


def read(data: Tensor | Rows, index: Tensor) -> Tensor:
    """Return the rows at `index`, int64 (n,) on any device: of a tensor on its own device, of other rows on the CPU."""
    if isinstance(data, Tensor):
        return data[index.to(data.device)]
    return torch.from_numpy(data.rows(index.cpu().numpy()))


def taken(data: Tensor | Rows, index: Tensor) -> Tensor | Rows:
    """Return the rows at `index`, int64 (n,) on the CPU: of a tensor a copy, of other rows a view."""
    return data[index.to(data.device)] if isinstance(data, Tensor) else View(data, index.numpy())


class LabelledRows:
    """Rows with class labels: what data sets of images and of latents share.

    Attributes:
        storage: the rows.
        labels: class numbers from 0, int64 (N,), or None.
        name: where the rows are from; starts every error message.
        class_names: one name per class.
    """

    def __init__(
        self, storage: Rows, labels: npt.NDArray[np.int64] | None, name: str, class_names: tuple[str, ...]
    ) -> None:
        self.storage, self.labels, self.name, self.class_names = storage, labels, name, class_names

    def __len__(self) -> int:
        return len(self.storage)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of every row."""
        channels, height, width = map(int, self.storage.shape)
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels; a subset keeps the number of the full data set."""
        return len(self.class_names)

    def rows(self, indices: Sequence[int] | Index) -> npt.NDArray[Any]:
        """Return the rows at `indices`, in any order and with repeats, as a new array (n, C, H, W)."""
        return self.storage.rows(np.asarray(indices, np.int64))

    def prefetch(self, indices: Sequence[int] | Index) -> None:
        """Begin to read rows, see `rows.prefetch`."""
        prefetch(self.storage, np.asarray(indices, np.int64))

    def array(self) -> npt.NDArray[Any]:
        """Return all rows as one array (N, C, H, W): an array that holds them (do not write to it), else a new one.

        Raises:
            UserError: if a new array does not fit into memory.
        """
        if isinstance(self.storage, ArrayRows):
            return self.storage.array
        if isinstance(self.storage, KeptRows):
            return self.storage.array()
        size = len(self) * math.prod(self.shape) * row_type(self.storage).itemsize
        require_memory(size, f"{self.name}: one array of all {len(self)} rows", "use fewer or smaller images")
        return self.rows(np.arange(len(self)))

    def tensor(self) -> Tensor:
        """Return `array` as a tensor that shares its memory."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            return torch.from_numpy(self.array())

    def _index(self, indices: Sequence[int] | Index) -> Index:
        """Return indices as an array; raise IndexError if one is out of range."""
        return np.arange(len(self))[np.asarray(indices, np.int64)]
