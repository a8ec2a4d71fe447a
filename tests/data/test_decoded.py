import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import multistage_diffusion
from multistage_diffusion.data import decoded, decoding, rows
from multistage_diffusion.data.decoded import DecodedRows, open_files
from multistage_diffusion.data.image_files import ImageFiles
from multistage_diffusion.data.options import Options
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    return buffer.getvalue()


ARRAYS = [pixels(i, 4, 6, 3) if i % 3 else pixels(i, 4, 6) for i in range(40)]
IMAGES = np.stack([np.stack([a] * 3) if a.ndim == 2 else a.transpose(2, 0, 1) for a in ARRAYS])


class Counted:
    """Image files that note which of them are read."""

    def __init__(self) -> None:
        self.files, self.read = [png(array) for array in ARRAYS], []

    def __call__(self, number: int) -> bytes:
        self.read.append(number)
        return self.files[number]


def decoded_rows(read, kept=range(40)):
    files = ImageFiles("set", [f"file {i}" for i in range(40)], read)
    return DecodedRows(files, np.array(kept), (3, 4, 6), Options())


def test_rows_are_decoded_when_drawn_in_any_order_and_repeats_once():
    read = Counted()
    found = decoded_rows(read)
    assert (len(found), found.shape, read.read) == (40, (3, 4, 6), [])
    index = np.array([7, 3, 7, 39, 0])
    np.testing.assert_array_equal(found.rows(index), IMAGES[index])
    assert sorted(read.read) == [0, 3, 7, 39]
    assert found.rows(np.empty(0, np.int64)).shape == (0, 3, 4, 6)
    assert found.rows(np.arange(40)).flags.c_contiguous


def test_files_that_are_left_out_are_no_rows():
    found = decoded_rows(Counted(), [5, 9, 33])
    np.testing.assert_array_equal(found.rows(np.array([2, 0])), IMAGES[[33, 5]])


def test_what_was_announced_is_decoded_in_the_background_and_once():
    read = Counted()
    found = decoded_rows(read)
    found.prefetch(np.array([4, 5, 6, 4]))
    deadline = time.monotonic() + 10
    while len(read.read) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    assert sorted(read.read) == [4, 5, 6]
    np.testing.assert_array_equal(found.rows(np.array([5, 8, 4])), IMAGES[[5, 8, 4]])
    assert sorted(read.read) == [4, 5, 6, 8]
    found.rows(np.array([5]))
    assert sorted(read.read) == [4, 5, 5, 6, 8]  # a row is kept until it is drawn, not longer


def test_what_is_announced_and_never_drawn_does_not_pile_up(monkeypatch):
    monkeypatch.setattr(decoded, "AHEAD", 3 * 72)  # three images
    read = Counted()
    found = decoded_rows(read)
    for start in range(0, 30, 10):
        found.prefetch(np.arange(start, start + 10))
    assert sorted(found._begun) == [0, 1, 2, 10, 11, 12, 20, 21, 22]
    found.prefetch(np.arange(30, 40))
    assert sorted(found._begun) == [30, 31, 32]
    np.testing.assert_array_equal(found.rows(np.arange(40)), IMAGES)


def test_several_threads_may_draw_at_once():
    found, results = decoded_rows(Counted()), {}

    def draw(number: int) -> None:
        for seed in range(20):
            index = np.random.default_rng((number, seed)).integers(0, 40, 10)
            found.prefetch(index)
            results[number, seed] = (found.rows(index) == IMAGES[index]).all()

    threads = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 80
    assert all(results.values())


def test_a_file_that_has_changed_is_named():
    read = Counted()
    found = decoded_rows(read)
    read.files[3] = b""
    with pytest.raises(UserError, match=r"set: file 3 cannot be read any more \(it is empty\); restore it and start"):
        found.rows(np.array([2, 3]))
    read.files[3] = png(pixels(0, 5, 6))
    with pytest.raises(UserError, match=r"file 3 cannot be read any more \(it has become 5x6\)"):
        found.rows(np.array([3]))
    np.testing.assert_array_equal(found.rows(np.array([2])), IMAGES[[2]])


def saved(folder):
    for i, array in enumerate(ARRAYS):
        path = folder / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(array))
    return folder


def test_a_large_data_set_is_that_of_memory(tmp_path, monkeypatch):
    saved(tmp_path)
    small = open_data(tmp_path)
    assert isinstance(small.storage, rows.ArrayRows)
    monkeypatch.setattr(rows, "IN_MEMORY", 0)
    large = open_data(tmp_path)
    assert isinstance(large.storage, DecodedRows)
    np.testing.assert_array_equal(large.array(), small.array())
    assert large.labels.tolist() == small.labels.tolist()
    assert large.fingerprint == small.fingerprint
    for own, others in zip(large.split(0.3), small.split(0.3), strict=True):
        assert own.storage.source is large.storage  # nothing is copied
        assert own.fingerprint == others.fingerprint


@pytest.mark.parametrize("how", ["rewritten", "removed"])
def test_a_file_of_a_folder_that_changes_after_opening_is_an_error(tmp_path, monkeypatch, how):
    monkeypatch.setattr(rows, "IN_MEMORY", 0)
    data = open_data(saved(tmp_path))
    path = tmp_path / "a" / "00.png"
    content = path.read_bytes()
    path.unlink()
    if how == "rewritten":
        path.write_bytes(content)
        os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match=rf"{tmp_path}: a/00\.png cannot be read any more \(.*\); restore it"):
        data.rows([0])
    np.testing.assert_array_equal(data.rows([1])[0], data.rows(np.array([1]))[0])


def test_labels_follow_the_files_that_are_used():
    files = [b"bad", png(ARRAYS[0]), png(ARRAYS[3])]
    with pytest.warns(UserWarning, match="skipped 1 of 3"):
        data = open_files(
            ImageFiles("set", ["x", "y", "z"], files.__getitem__),
            [4, 2, 0],
            Options(skip_bad=True),
            tuple("abcde"),
            {"not images": 2},
        )
    assert data.labels.tolist() == [2, 0]
    assert data.class_names == tuple("abcde")
    assert data.skipped == {"not images": 2, "unreadable": 1}
    np.testing.assert_array_equal(data.array()[:, 0], [ARRAYS[0], ARRAYS[3]])


@pytest.mark.parametrize("kind", ["folder", "zip", "tar"])
def test_processes_read_folders_and_archives_as_one_process_does(tmp_path, monkeypatch, kind):
    folder = saved(tmp_path / "set")
    source = folder if kind == "folder" else shutil.make_archive(str(tmp_path / "set"), kind, folder)
    expected = open_data(source)
    monkeypatch.setattr(decoding, "MANY", 2)
    monkeypatch.setattr(rows, "IN_MEMORY", 0)
    found = open_data(source)
    assert found.fingerprint == expected.fingerprint
    order = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(found.rows(order), expected.rows(order))
    assert found.storage._decoder._processes is not None


@pytest.mark.slow
def test_ctrl_c_while_photos_are_read_is_answered_within_two_seconds(tmp_path):
    """Photos of 12 megapixels, each of which takes a process a quarter of a second."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 400, 3), np.uint8)).resize((4000, 3000))
    buffer = io.BytesIO()
    photo.save(buffer, "jpeg", quality=90)
    for i in range(300):
        (tmp_path / f"{i:03}.jpg").write_bytes(buffer.getvalue())
    script = (
        "import sys\n"
        "from multistage_diffusion.data.sources import open_data\n"
        "told = lambda *_: print('reading', flush=True)\n"
        "try:\n"
        "    open_data(sys.argv[1], size=(2999, 3999), fit='crop', progress=told)\n"
        "except KeyboardInterrupt:\n"
        "    print('stopped', flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(multistage_diffusion.__file__).parents[1])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"reading\n"
        start = time.monotonic()
        child.send_signal(signal.SIGINT)
        assert b"stopped\n" in iter(child.stdout.readline, b"")
        assert time.monotonic() - start < 2.0
        assert child.wait(30) == 0
