import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import multistage_diffusion
from multistage_diffusion.data import ImageData, to_float, to_uint8
from multistage_diffusion.data.rows import ArrayRows


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2000, 3, 4, 5), dtype=np.uint8)
    return ImageData(images, rng.integers(0, 7, 2000), "set")


def rows(data):
    return {image.tobytes() for image in data.array()}


def test_shape_length_and_classes(data):
    assert (len(data), data.shape, data.num_classes) == (2000, (3, 4, 5), 7)
    assert data.class_names == tuple("0123456")
    unlabelled = ImageData(data.array(), None, "set")
    assert unlabelled.num_classes == 0


def test_small_label_types_become_int64(data):
    converted = ImageData(data.array(), data.labels.astype(np.uint8), "set")
    assert converted.labels.dtype == np.int64
    np.testing.assert_array_equal(converted.labels, data.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((4, 1, 2, 2))}, r"set: images must be uint8 .*float64"),
        ({"images": np.zeros((4, 2, 2), np.uint8)}, r"set: images must be uint8 \(N, C, H, W\).*\(4, 2, 2\)"),
        ({"labels": np.zeros(3, np.int64)}, "set: 3 labels for 4 images"),
        ({"labels": np.zeros(4)}, "set: labels must be integers .*float64"),
        ({"labels": np.zeros((4, 1), np.int64)}, r"set: labels must be integers .*\(4, 1\)"),
        ({"labels": np.array([0, 1, -1, 2])}, "set: label -1 is not in"),
        ({"labels": np.array([0, 1, 10**9, 2])}, "set: label 1000000000 is not in"),
        ({"class_names": ("a", "b")}, "set: label 3, but 2 class_names; labels count from 0"),
        ({"labels": None, "class_names": ("a",)}, "set: class_names=.* without labels"),
    ],
)
def test_refuses(change, message):
    good = {"images": np.zeros((4, 1, 2, 2), np.uint8), "labels": np.arange(4), "name": "set"}
    ImageData(**good)
    with pytest.raises(ValueError, match=message):
        ImageData(**(good | change))


def test_fingerprint_sees_every_pixel_label_and_shape(data):
    pixel = data.array().copy()
    pixel[-1, -1, -1, -1] ^= 1
    label = data.labels.copy()
    label[-1] = (label[-1] + 1) % 7
    variants = [
        data,
        ImageData(pixel, data.labels, "set"),
        ImageData(data.array(), label, "set"),
        ImageData(data.array(), None, "set"),
        ImageData(data.array().reshape(2000, 3, 5, 4), data.labels, "set"),
        data.subset(np.arange(2000)[::-1]),
    ]
    assert len({v.fingerprint for v in variants}) == len(variants)
    assert ImageData(data.array().copy(), data.labels, "other name", tuple("abcdefg")).fingerprint == data.fingerprint


def test_fingerprint_is_the_same_for_any_chunk_size_and_memory_layout(data, monkeypatch):
    whole = data.fingerprint
    monkeypatch.setattr("multistage_diffusion.data.dataset._CHUNK_BYTES", 70)
    assert ImageData(data.array(), data.labels, "set").fingerprint == whole
    strided = np.ascontiguousarray(data.array().transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert ImageData(strided, data.labels, "set").fingerprint == whole


def test_fingerprints_and_held_out_images_never_change(data):
    """A run that was begun with an earlier release goes on."""
    assert data.fingerprint == "aaf55d6ca768a115248961d0c3d030267c2fc4d28dba55339919f5aef587e6b0"
    unlabelled = ImageData(data.array(), None, "set")
    assert unlabelled.fingerprint == "2cd7c7509d93f82f3953519b3c351233d33fd2a981c45b3c9360cdb0ee9acd02"
    train, held_out = data.split(0.01)
    assert train.fingerprint == "06c308eb965dc605e1c42103b5d8e3f88a3b81903b3c0b2601a7dd39a26b96a3"
    assert held_out.fingerprint == "8d83bc77314fed4a5695d39eae1aa011e0de9eabced5dcc44392ba1816d39730"
    expected = [
        123,
        207,
        474,
        591,
        748,
        911,
        968,
        1087,
        1209,
        1220,
        1377,
        1551,
        1582,
        1669,
        1689,
        1716,
        1740,
        1958,
        1976,
    ]
    np.testing.assert_array_equal(held_out.array(), data.array()[expected])


class Watched(ArrayRows):
    """Notes how many rows are read."""

    def __init__(self, array):
        super().__init__(array)
        self.read = []

    def rows(self, indices):
        self.read.append(len(indices))
        return super().rows(indices)


def test_subsets_and_splits_are_views_that_copy_nothing(data):
    watched = Watched(data.array())
    whole = ImageData(watched, data.labels, "set")
    train, held_out = whole.split(0.1)
    assert sum(watched.read) == 2000  # once, for the hashes
    whole.split(0.3)
    part = train.subset(range(5, 50)).subset([3, 3, 1])
    assert sum(watched.read) == 2000
    assert part.storage.source is held_out.storage.source is watched
    np.testing.assert_array_equal(part.rows([2, 0]), train.array()[[6, 8]])
    np.testing.assert_array_equal(part.labels, train.labels[[8, 8, 6]])


def test_chunks_are_of_bounded_size(data, monkeypatch):
    monkeypatch.setattr("multistage_diffusion.data.dataset._CHUNK_BYTES", 60 * 300)
    watched = Watched(data.array())
    whole = ImageData(watched, data.labels, "set")
    assert whole.fingerprint == data.fingerprint
    assert set(watched.read) == {300, 200}
    held_out = whole.split(0.1)[1]
    assert max(watched.read) == 300
    np.testing.assert_array_equal(np.concatenate(list(held_out.chunks())), data.split(0.1)[1].array())


RESIDENT = """
import re, sys
import numpy as np
import torch
from tiny import tiny_config
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.training.batches import BatchSource, held_out_batch

def peak():
    with open("/proc/self/status") as file:
        return int(re.search(r"VmHWM:\\s+(\\d+) kB", file.read())[1]) / 1024

small = open_data(sys.argv[1])  # what is loaded at first use
small.fingerprint, small.split(0.1)
cpu, config = torch.device("cpu"), tiny_config(network__channels=3, training__flip=True)
BatchSource(config, small, cpu).draw(0, (4, 4, 4))
before, told = peak(), []
data = open_data(sys.argv[2])
train, held_out = data.split(0.1)
data.fingerprint
source = BatchSource(config, train, cpu)
for step in range(200):
    source.draw(step, (4, 4, 4))
held_out_batch(config, held_out, 0, cpu)
print(len(data), len(train), len(held_out), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_a_file_far_larger_than_memory_may_be_is_split_and_drawn_from(tmp_path):
    """2 GiB of zeros with a few other images; the file takes little room on disk."""
    rows, shape = np.random.default_rng(0), (3, 64, 64)
    count = (2 << 30) // (3 * 64 * 64)
    images = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (count, *shape))
    for row in rows.integers(0, count, 100):
        images[row] = rows.integers(0, 256, shape)
    del images
    np.save(tmp_path / "small.npy", rows.integers(0, 256, (100, *shape), dtype=np.uint8))
    files = [str(tmp_path / name) for name in ("small.npy", "large.npy")]
    done = subprocess.run([sys.executable, "-c", RESIDENT, *files], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    found, train, held_out, grown = map(float, done.stdout.split())
    assert found == train + held_out == count
    assert min(train, held_out) > 0
    assert grown < 200  # MiB


def environment():
    places = [Path(__file__).parents[1], Path(multistage_diffusion.__file__).parents[1]]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places)), "OMP_NUM_THREADS": "1"}


def test_subset_keeps_order_labels_and_classes(data):
    part = data.subset([5, 2, 5])
    np.testing.assert_array_equal(part.array(), data.array()[[5, 2, 5]])
    np.testing.assert_array_equal(part.labels, data.labels[[5, 2, 5]])
    assert part.num_classes == 7


@pytest.mark.parametrize("held_out", [0.05, 0.1, 0.5])
def test_split_is_disjoint_exhaustive_and_near_the_share(data, held_out):
    train, held = data.split(held_out)
    assert rows(train).isdisjoint(rows(held))
    assert rows(train) | rows(held) == rows(data)
    assert len(train) + len(held) == len(data)
    assert abs(len(held) / 2000 - held_out) < 4 * (held_out * (1 - held_out) / 2000) ** 0.5


def test_split_carries_labels_along(data):
    for side in data.split(0.3):
        label_of = {image.tobytes(): label for image, label in zip(data.array(), data.labels, strict=True)}
        assert [label_of[image.tobytes()] for image in side.array()] == side.labels.tolist()


def test_split_does_not_depend_on_order_labels_or_other_images(data):
    held = rows(data.split(0.2)[1])
    assert rows(data.subset(np.random.default_rng(1).permutation(2000)).split(0.2)[1]) == held
    assert rows(ImageData(data.array(), None, "renamed").split(0.2)[1]) == held
    first = data.subset(range(1000))
    assert rows(first.split(0.2)[1]) == held & rows(first)


def test_a_larger_share_keeps_what_was_held_out(data):
    assert rows(data.split(0.1)[1]) < rows(data.split(0.2)[1])


def test_duplicates_go_to_one_side(data):
    doubled = data.subset([*range(2000), *range(2000)])
    train, held = doubled.split(0.3)
    assert rows(train).isdisjoint(rows(held))
    assert len(held) == 2 * len(data.split(0.3)[1])


def test_equal_bytes_of_another_shape_are_another_image(data):
    turned = ImageData(data.array().reshape(2000, 3, 5, 4), None, "set")
    assert rows(turned.split(0.2)[1]) != rows(data.split(0.2)[1])


def test_holding_out_nothing_returns_the_whole(data):
    train, held = data.split(0.0)
    assert train is data
    assert (len(held), held.shape, held.num_classes) == (0, (3, 4, 5), 7)


@pytest.mark.parametrize("held_out", [-0.1, 1.0, float("nan")])
def test_split_refuses_shares_outside_the_range(data, held_out):
    with pytest.raises(ValueError, match=r"data\.held_out=.* must be in \[0, 1\)"):
        data.split(held_out)


def test_of_few_images_one_is_held_out(data):
    train, held = (part.subset(range(3)) for part in data.split(0.5))
    with pytest.raises(ValueError, match=r"data\.held_out=0\.5 leaves no training images among the 3 of set"):
        held.split(0.5)
    for few in (train, train.subset([2, 0, 1])):
        parts = few.split(0.5)
        assert tuple(len(part) for part in parts) == (2, 1)
        assert sorted(image.tobytes() for part in parts for image in part.array()) == sorted(
            image.tobytes() for image in few.array()
        )
    first, again = (few.split(0.5)[1].array() for few in (train, train.subset([2, 0, 1])))
    assert np.array_equal(first, again)  # whatever the order


def test_copies_of_one_image_are_not_split(data):
    with pytest.raises(ValueError, match=r"data\.held_out=0\.5: set has no two different images"):
        data.subset([1, 1, 1]).split(0.5)


def test_floats_and_bytes_round_trip_exactly():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_float(levels)
    assert x.dtype == torch.float32
    assert (x[0].item(), x[255].item()) == (-1.0, 1.0)
    torch.testing.assert_close(x.double(), levels.double() / 127.5 - 1, rtol=0, atol=1e-7)
    assert torch.equal(to_uint8(x), levels)


def test_to_uint8_rounds_and_clamps():
    x = torch.tensor([-3.0, 3.0, 10.4 / 127.5 - 1, 10.6 / 127.5 - 1])
    assert to_uint8(x).tolist() == [0, 255, 10, 11]


def test_to_float_reads_read_only_arrays_without_a_warning(tmp_path, recwarn):
    np.save(tmp_path / "a.npy", np.full((2, 1, 2, 2), 255, np.uint8))
    assert torch.equal(to_float(np.load(tmp_path / "a.npy", mmap_mode="r")), torch.ones(2, 1, 2, 2))
    assert not recwarn.list


def test_to_float_refuses_floats():
    with pytest.raises(ValueError, match=r"must be uint8, not torch\.float32"):
        to_float(torch.zeros(3))


def test_content_stays_with_subsets_and_splits_and_out_of_the_fingerprint():
    images = np.random.default_rng(0).integers(0, 256, (40, 1, 4, 4), dtype=np.uint8)
    padded, plain = ImageData(images, None, "x", (), (2, 3)), ImageData(images, None, "x")
    assert plain.content is None
    assert padded.fingerprint == plain.fingerprint
    assert [part.content for part in (padded.subset([1]), *padded.split(0.5), *padded.split(0))] == [(2, 3)] * 5


def test_a_data_set_describes_itself():
    grey = np.zeros((3, 1, 4, 6), np.uint8)
    assert ImageData(grey, None, "set").describe() == "set: 3 images, no labels, 4 x 6, grey"
    passed = {"hidden or system files": 2, "unreadable": 1}
    data = ImageData(np.zeros((3, 3, 4, 6), np.uint8), np.array([0, 2, 0]), "set", skipped=passed)
    assert data.describe() == (
        "set: 3 images, 3 classes, 4 x 6, colour, 3 files skipped (2 hidden or system files, 1 unreadable)"
    )
