import gzip
import os
import struct
import tracemalloc

import numpy as np
import pytest

from multistage_diffusion.data.sources import fashion_mnist, open_data

IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def encode(array):
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write(folder, images, labels, *, compress):
    for name, content in ((IMAGES, encode(images)), (LABELS, encode(labels))):
        (folder / f"{name}{'.gz' if compress else ''}").write_bytes(gzip.compress(content) if compress else content)


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (6, 5, 4), dtype=np.uint8), np.array([9, 0, 3, 3, 1, 2], np.uint8)


@pytest.mark.parametrize("compress", [False, True])
def test_reads_images_labels_and_names(tmp_path, pair, compress):
    write(tmp_path, *pair, compress=compress)
    data = open_data(f"fashion-mnist:{tmp_path}")
    np.testing.assert_array_equal(data.array()[:, 0], pair[0])
    assert data.labels.tolist() == pair[1].tolist()
    assert data.num_classes == 10
    assert data.class_names[9] == "Ankle boot"
    assert open_data(f"fashion-mnist:{tmp_path}", size=(3, 2), fit="crop").shape == (1, 3, 2)


@pytest.mark.parametrize("source", ["fashion-mnist", "fashion-mnist:{}"])
def test_missing_files_say_how_to_get_them(tmp_path, monkeypatch, source):
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path)
    with pytest.raises(ValueError, match=rf"no {IMAGES} .*dataset-fashion-mnist.*fashion-mnist:FOLDER"):
        open_data(source.format(tmp_path))


def test_missing_labels_are_named(tmp_path, pair):
    write(tmp_path, *pair, compress=False)
    (tmp_path / LABELS).unlink()
    with pytest.raises(ValueError, match=f"no {LABELS}"):
        open_data(f"fashion-mnist:{tmp_path}")


def test_no_folder_after_the_colon():
    with pytest.raises(
        ValueError, match=r"data\.source='fashion-mnist:': nothing follows the colon; write fashion-mnist\[:FOLDER\]"
    ):
        open_data("fashion-mnist:")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-7], r"has 113 bytes for 6 x 5 x 4"),
        (lambda c: c + b"x", r"has 121 bytes for 6 x 5 x 4"),
        (lambda c: c[:10], "not an idx file"),
        (lambda c: b"", "starts with nothing"),
        (lambda c: b"\1" + c[1:], "starts with 01000803, not an idx file"),
        (lambda c: c[:2] + b"\x0d" + c[3:], "starts with 00000d03, not an idx file"),
        (lambda c: c[:3] + b"\1" + c[4:], "starts with 00000801, not an idx file of 3-dimensional"),
        (lambda c: encode(np.zeros((0, 5, 4), np.uint8)), "has 0 bytes for 0 x 5 x 4"),
    ],
)
@pytest.mark.parametrize("compress", [False, True])
def test_damaged_images_are_named(tmp_path, pair, compress, change, message):
    write(tmp_path, *pair, compress=compress)
    path = tmp_path / (f"{IMAGES}.gz" if compress else IMAGES)
    content = change(encode(pair[0]))
    path.write_bytes(gzip.compress(content) if compress else content)
    with pytest.raises(ValueError, match=rf"{path.name}: .*{message}"):
        open_data(f"fashion-mnist:{tmp_path}")


@pytest.mark.parametrize(
    "content", [b"not gzip", gzip.compress(bytes(1000), mtime=0)[:-9], b""], ids=["none", "cut off", "empty"]
)
def test_damaged_compression_is_named(tmp_path, pair, content):
    write(tmp_path, *pair, compress=True)
    (tmp_path / f"{LABELS}.gz").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{LABELS}\.gz: "):
        open_data(f"fashion-mnist:{tmp_path}")


def test_labels_must_fit_the_images(tmp_path, pair):
    write(tmp_path, pair[0], pair[1][:-1], compress=False)
    with pytest.raises(ValueError, match="5 labels for 6 images"):
        open_data(f"fashion-mnist:{tmp_path}")
    write(tmp_path, pair[0], pair[1] + 1, compress=False)
    with pytest.raises(ValueError, match="label 10, but 10 class_names"):
        open_data(f"fashion-mnist:{tmp_path}")


@pytest.mark.skipif(not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debian_files():
    data = open_data("fashion-mnist")
    assert data.array().shape == (60000, 1, 28, 28)
    assert np.bincount(data.labels).tolist() == [6000] * 10
    assert data.class_names[data.labels[0]] == "Ankle boot"
    assert abs(data.array().mean() / 255 - 0.2860) < 1e-4  # the mean commonly used to normalise this set


def test_a_compressed_file_is_unpacked_no_further_than_its_header_says(tmp_path):
    content = bytes((0, 0, 8, 1)) + struct.pack(">I", 100)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(content + bytes(20_000_000)))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"bomb\.gz: has at least 1124 bytes for 100; download the file again"):
        fashion_mnist.read_idx(tmp_path / "bomb.gz", 1)
    huge = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2**31, 2**10, 2**10)
    (tmp_path / "huge.gz").write_bytes(gzip.compress(huge))
    with pytest.raises(ValueError, match=r"huge\.gz: it claims 2251799813685248 bytes, more than its"):
        fashion_mnist.read_idx(tmp_path / "huge.gz", 3)
    assert tracemalloc.get_traced_memory()[1] < 2e6
    tracemalloc.stop()


def test_a_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=r"pipe: it is a named pipe, not a file"):
        fashion_mnist.read_idx(tmp_path / "pipe", 1)
