import os
from pathlib import Path

import numpy as np
import pytest
import torch

from multistage_diffusion import memory
from multistage_diffusion.data import ImageData
from multistage_diffusion.data import rows as rows_module
from multistage_diffusion.data.rows import (
    ArrayRows,
    FileRows,
    KeptRows,
    ScaledRows,
    View,
    as_rows,
    batches,
    chunks,
    fits_memory,
    prefetch,
    read,
    row_type,
    taken,
)
from multistage_diffusion.errors import UserError


class Counted:
    """Rows that are made when they are asked for; row i holds i. The number of each request is noted."""

    def __init__(self, count: int, shape: tuple[int, int, int] = (1, 2, 3)) -> None:
        self.count, self.shape, self.asked = count, shape, []

    def __len__(self) -> int:
        return self.count

    def rows(self, indices: np.ndarray) -> np.ndarray:
        self.asked.append(len(indices))
        return np.broadcast_to(
            (indices % 251).astype(np.uint8)[:, None, None, None], (len(indices), *self.shape)
        ).copy()


def pixels(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


LAYOUTS = {
    "plain": pixels(9, 3, 4, 5),
    "channels last": pixels(9, 4, 5, 3).transpose(0, 3, 1, 2),
    "every other": pixels(18, 3, 4, 5)[::2],
    "backwards": pixels(9, 3, 4, 5)[::-1],
    "floats": pixels(9, 3, 4, 5).astype(np.float32),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_of_an_array_come_in_any_order_as_a_new_contiguous_array(layout):
    array = LAYOUTS[layout]
    found = ArrayRows(array).rows(np.array([8, 0, 8, 3]))
    np.testing.assert_array_equal(found, [array[8], array[0], array[8], array[3]])
    assert found.flags.c_contiguous
    assert found.dtype == array.dtype == row_type(ArrayRows(array))
    assert not np.shares_memory(found, array)
    assert ArrayRows(array).shape == (3, 4, 5)
    assert ArrayRows(array).rows(np.empty(0, np.int64)).shape == (0, 3, 4, 5)


def test_scaled_rows_are_the_rows_times_the_factor_and_change_nothing():
    array = LAYOUTS["floats"].copy()
    scaled = ScaledRows(ArrayRows(array), 0.3)
    index = np.array([8, 0, 8])
    np.testing.assert_array_equal(scaled.rows(index), array[index] * np.float32(0.3))
    assert (len(scaled), scaled.shape, scaled.rows(index).dtype) == (9, (3, 4, 5), np.float32)
    np.testing.assert_array_equal(array, LAYOUTS["floats"])


def test_rows_of_floats_are_read_from_a_file(tmp_path):
    array = np.random.default_rng(0).standard_normal((9, 3, 4, 5)).astype(np.float32)
    path = tmp_path / "floats"
    path.write_bytes(b"head" + array.tobytes())
    found = FileRows(path, 4, 9, (3, 4, 5), dtype=np.float32).rows(np.array([8, 3, 4, 5, 0, 0]))
    np.testing.assert_array_equal(found, array[[8, 3, 4, 5, 0, 0]])


def test_views_are_composed_and_copy_nothing():
    source = Counted(100)
    view = View(View(source, np.arange(90, 10, -1)), np.array([0, 5, 5]))
    assert view.source is source
    assert view.index.tolist() == [90, 85, 85]
    assert source.asked == []
    assert view.rows(np.array([2, 0]))[:, 0, 0, 0].tolist() == [85, 90]
    assert source.asked == [2]
    assert (len(view), view.shape) == (3, (1, 2, 3))


def test_chunks_and_batches_yield_every_row_once_in_order():
    for parts in (chunks(Counted(10), 4), batches(Counted(10), 4), batches(torch.arange(10)[:, None, None, None], 4)):
        found = [part[:, 0, 0, 0].tolist() for part in parts]
        assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_some_rows_of_a_tensor_or_of_others():
    index = torch.tensor([7, 2])
    assert read(torch.arange(10), index).tolist() == [7, 2]
    assert read(Counted(10), index)[:, 0, 0, 0].tolist() == [7, 2]
    assert taken(torch.arange(10), index).tolist() == [7, 2]
    view = taken(Counted(10), index)
    assert isinstance(view, View)
    assert view.rows(np.arange(2))[:, 0, 0, 0].tolist() == [7, 2]


def test_arrays_and_tensors_become_rows_that_share_their_memory():
    tensor = torch.zeros(3, 1, 2, 2)
    assert np.shares_memory(as_rows(tensor).array, tensor.numpy())
    assert as_rows(LAYOUTS["plain"]).array is LAYOUTS["plain"]
    source = Counted(3)
    assert as_rows(source) is source


def stored(array: np.ndarray, path: Path, **options: bool) -> FileRows:
    path.write_bytes(b"head" + array.tobytes())
    return FileRows(path, 4, len(array), array.shape[1:], **options)


def test_rows_of_a_file_come_in_any_order_and_consecutive_ones_at_once(tmp_path, monkeypatch):
    array, reads = pixels(20, 3, 4, 5), []
    source = stored(array, tmp_path / "rows")
    assert (len(source), source.shape) == (20, (3, 4, 5))
    preadv = os.preadv

    def watched(handle, buffers, place):
        reads.append(len(buffers[0]) // 60)
        return preadv(handle, buffers, place)

    monkeypatch.setattr(os, "preadv", watched)
    for index, sizes in (
        ([7], [1]),
        ([19, 0, 1, 2, 2, 3, 18, 19], [1, 3, 2, 2]),
        (range(20), [20]),
        (range(19, -1, -1), [1] * 20),
        ([0, 1], [2]),
        ([], []),
    ):
        reads.clear()
        found = source.rows(np.array(index, np.int64))
        np.testing.assert_array_equal(found, array[np.array(index, np.int64)])
        assert reads == sizes


def test_channels_may_be_last_in_a_file(tmp_path):
    array = pixels(20, 4, 5, 3)
    source = stored(array, tmp_path / "rows", channels_last=True)
    assert source.shape == (3, 4, 5)
    found = source.rows(np.array([3, 3, 17]))
    np.testing.assert_array_equal(found, array[[3, 3, 17]].transpose(0, 3, 1, 2))
    assert found.flags.c_contiguous


def test_a_read_may_return_less_than_was_asked_for(tmp_path, monkeypatch):
    source, preadv = stored(pixels(20, 3, 4, 5), tmp_path / "rows"), os.preadv
    monkeypatch.setattr(os, "preadv", lambda handle, buffers, place: preadv(handle, [buffers[0][:7]], place))
    np.testing.assert_array_equal(source.rows(np.arange(20)), pixels(20, 3, 4, 5))


def test_a_file_that_is_cut_short_or_fails_is_an_error_of_one_line(tmp_path, monkeypatch):
    source = stored(pixels(20, 3, 4, 5), tmp_path / "rows")
    before = (tmp_path / "rows").stat()
    os.truncate(tmp_path / "rows", 4 + 60 * 10 + 3)
    with pytest.raises(UserError, match=r"rows: has been written since it was opened"):
        source.rows(np.array([0]))
    os.utime(tmp_path / "rows", ns=(before.st_atime_ns, before.st_mtime_ns))  # cut short while it is read
    assert len(source.rows(np.arange(10))) == 10
    with pytest.raises(UserError, match=r"rows: has become shorter since it was opened; restore it"):
        source.rows(np.array([0, 10]))

    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(UserError, match=r"rows: cannot be read \(Input/output error\)"):
        source.rows(np.array([0]))


def test_a_file_is_closed_with_its_rows(tmp_path):
    source = stored(pixels(2, 3, 4, 5), tmp_path / "rows")
    handle = source._handle
    os.fstat(handle)
    del source
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(handle)


def test_all_rows_are_an_array_that_exists_or_a_new_one():
    array = LAYOUTS["channels last"]
    data = ImageData(array, None, "set")
    assert data.array() is array
    assert np.shares_memory(data.tensor().numpy(), array)
    made = ImageData(Counted(10), None, "made").subset([3, 1]).array()
    assert made[:, 0, 0, 0].tolist() == [3, 1]


def test_an_array_that_does_not_fit_into_memory_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: 10 * 6 - 1)
    data = ImageData(Counted(10), None, "made")
    with pytest.raises(
        UserError, match=r"made: one array of all 10 rows needs at least .*; use fewer or smaller images"
    ):
        data.tensor()
    assert len(data.subset(range(9)).tensor()) == 9


def test_an_index_out_of_range_is_an_error_at_once():
    with pytest.raises(IndexError):
        ImageData(Counted(10), None, "made").subset([10])
    assert ImageData(Counted(10), None, "made").subset([-1]).array()[0, 0, 0, 0] == 9


def test_kept_rows_are_read_once():
    source = Counted(600)
    kept = KeptRows(source)
    asked = source.asked.copy()
    assert kept.rows(np.array([5, 2, 5]))[:, 0, 0, 0].tolist() == [5, 2, 5]
    assert kept.rows(np.array([2, 3]))[:, 0, 0, 0].tolist() == [2, 3]
    assert source.asked == [*asked, 2, 1]
    whole = kept.array()
    assert whole[:, 0, 0, 0].tolist() == (np.arange(600) % 251).tolist()
    assert sum(source.asked) == 600
    assert kept.array() is whole
    assert ImageData(kept, None, "set").array() is whole
    assert not np.shares_memory(kept.rows(np.array([5, 6])), whole)


class Announced(Counted):
    """Rows that note what is announced."""

    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.announced = []

    def prefetch(self, indices: np.ndarray) -> None:
        self.announced.append(indices.tolist())


def test_rows_are_announced_through_views():
    source = Announced(100)
    kept = KeptRows(source)
    data = ImageData(kept, None, "set").subset([90, 80, 70])
    data.prefetch([2, 0])
    kept.rows(np.array([70]))
    data.prefetch([2, 0, 0])
    data.prefetch([2])
    assert source.announced == [[70, 90], [90]]
    prefetch(ArrayRows(LAYOUTS["plain"]), np.arange(3))  # nothing to do


def test_the_next_chunk_is_announced():
    source = Announced(10)
    assert [len(part) for part in chunks(source, 4)] == [4, 4, 2]
    assert source.announced == [[4, 5, 6, 7], [8, 9]]


def test_sizes_of_which_memory_does_not_hold_a_few_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "require_memory", lambda needed, *words: asked.append((needed, *words[:1])))
    asked: list[tuple[int, str]] = []
    fits_memory(1000, (3, 20, 30))
    fits_memory(5, (3, 20, 30))
    assert asked == [
        (16 * 1800, "data.size=20x30 for 1000 images"),
        (5 * 1800, "data.size=20x30 for 5 images"),
    ]
