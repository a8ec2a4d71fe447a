import os
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data import rows
from multistage_diffusion.data.fitting import FittedRows
from multistage_diffusion.data.rows import FileRows
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5, 4, 6), None),
        ((5, 1, 4, 6), (0, 1, 2, 3)),
        ((5, 3, 4, 6), (0, 1, 2, 3)),
        ((5, 4, 6, 3), (0, 3, 1, 2)),
        ((5, 4, 6, 1), (0, 3, 1, 2)),
        ((3, 3, 5, 4), (0, 1, 2, 3)),
    ],
)
def test_every_layout_becomes_channels_first(tmp_path, suffix, shape, axes):
    images = pixels(*shape)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, images)
    else:
        np.savez(path, images)
    expected = images[:, None] if axes is None else images.transpose(axes)
    data = open_data(path)
    np.testing.assert_array_equal(data.array(), expected)
    assert data.labels is None


def test_a_npy_file_is_read_when_rows_are_asked_for(tmp_path):
    np.save(tmp_path / "a.npy", pixels(5, 4, 6, 3))
    data = open_data(tmp_path / "a.npy")
    assert isinstance(data.storage, FileRows)
    np.testing.assert_array_equal(data.rows([4])[0], pixels(5, 4, 6, 3)[4].transpose(2, 0, 1))
    before = (tmp_path / "a.npy").stat()
    with (tmp_path / "a.npy").open("r+b") as file:
        file.seek(-1, 2)
        file.write(bytes([pixels(5, 4, 6, 3)[-1, -1, -1, -1] ^ 1]))
    with pytest.raises(UserError, match=r"a\.npy: has been written since it was opened; restore it, or start again"):
        data.rows([4])
    os.utime(tmp_path / "a.npy", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert data.rows([4])[0, -1, -1, -1] == pixels(5, 4, 6, 3)[-1, -1, -1, -1] ^ 1  # read when asked for


def test_an_array_whose_first_axis_is_the_fastest_reads_alike(tmp_path):
    for name, images in (("a", pixels(5, 4, 6, 3)), ("b", np.asfortranarray(pixels(5, 4, 6, 3)))):
        np.save(tmp_path / f"{name}.npy", images)
    assert (tmp_path / "a.npy").read_bytes() != (tmp_path / "b.npy").read_bytes()
    assert open_data(tmp_path / "a.npy").fingerprint == open_data(tmp_path / "b.npy").fingerprint


@pytest.mark.parametrize("keys", [("images", "labels"), ("images", "label"), ("arr_0", "arr_1")])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_keys(tmp_path, keys, save):
    save(tmp_path / "a.npz", **{keys[0]: pixels(4, 2, 5), keys[1]: np.array([2, 0, 1, 2], np.uint8)})
    data = open_data(tmp_path / "a.npz")
    np.testing.assert_array_equal(data.array()[:, 0], pixels(4, 2, 5))
    assert data.labels.tolist() == [2, 0, 1, 2]
    assert data.labels.dtype == np.int64


def test_sizes_are_held_to_or_fitted(tmp_path):
    colours = np.full((2, 4, 12, 3), (10, 20, 30), np.uint8)
    colours[:, :, :4] = 255
    colours[:, :, 8:] = 255
    np.save(tmp_path / "a.npy", colours)
    assert isinstance(open_data(tmp_path / "a.npy", size=(4, 12)).storage, FileRows)
    with pytest.raises(ValueError, match=r"a\.npy: its images: height x width 4x12, not data\.size=4x4; add --fit"):
        open_data(tmp_path / "a.npy", size=(4, 4))
    cropped = open_data(tmp_path / "a.npy", size=(4, 4), fit="crop").array()
    np.testing.assert_array_equal(cropped, np.broadcast_to(np.array([10, 20, 30])[:, None, None], (2, 3, 4, 4)))


@pytest.mark.parametrize("fit", ["crop", "resize"])
@pytest.mark.parametrize("shape", [(3, 9, 14, 3), (3, 14, 9)])
def test_fitting_an_array_equals_fitting_its_images_in_a_folder(tmp_path, fit, shape):
    np.save(tmp_path / "a.npy", pixels(*shape))
    for i, image in enumerate(pixels(*shape)):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    array, folder = (open_data(source, size=(5, 6), fit=fit) for source in (tmp_path / "a.npy", tmp_path))
    assert array.array().shape[2:] == (5, 6)
    np.testing.assert_array_equal(array.array(), folder.array())


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 4, 4, 4), np.uint8), "neither 1 nor 3 channels.*drop the alpha"),
        (np.zeros((2, 5, 5, 5), np.uint8), "neither 1 nor 3 channels.*convert them to grey or RGB"),
        (np.zeros((2, 3, 9, 3), np.uint8), r"\(2, 3, 9, 3\) could be \(N, C, H, W\) or \(N, H, W, C\)"),
        (np.zeros((4, 4), np.uint8), r"images of shape \(4, 4\)"),
        (np.zeros((0, 4, 4), np.uint8), r"images of shape \(0, 4, 4\)"),
        (np.zeros((2, 0, 4), np.uint8), r"images of shape \(2, 0, 4\)"),
        (
            np.linspace(0, 1, 32).reshape(2, 4, 4),
            r"float64, not uint8: values in about \[0, 1\].*np\.round\(x \* 255\)",
        ),
        (
            np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 4, 4),
            r"float32, not uint8: values in about \[-1, 1\].*np\.round\(\(x \+ 1\) \* 127\.5\)",
        ),
        (
            np.array([[[0, 1], [np.nan, np.inf]], [[0, 0], [0.5, 1]]]),
            r"float64, not uint8, and 2 values in them are not finite \(NaN or infinite\); correct these images, then convert",
        ),
        (
            np.full((300, 2, 2), np.nan),
            r"and 1024 values in the first 256 images are not finite",
        ),
        (np.zeros((2, 4, 4), np.int64), "int64, not uint8: convert them to uint8"),
    ],
)
def test_refuses_other_images(tmp_path, images, message):
    np.save(tmp_path / "a.npy", images)
    with pytest.raises(ValueError, match=rf"a\.npy: images.*{message}|a\.npy: .*{message}"):
        open_data(tmp_path / "a.npy")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": pixels(2, 4, 4)}, "no array images or arr_0 among pictures"),
        ({"images": pixels(2, 4, 4), "labels": np.zeros(3, np.int64)}, "3 labels for 2 images"),
        ({"images": pixels(2, 4, 4), "labels": np.zeros((2, 10))}, r"labels must be integers .*\(2, 10\)"),
        ({"images": pixels(2, 4, 4), "labels": np.array([0, -1])}, "label -1 is not in"),
        ({"images": pixels(2, 4, 4), "labels": np.array([0, "a"], object)}, "cannot be read as plain NumPy arrays"),
    ],
)
def test_refuses_other_npz_content(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=rf"a\.npz: .*{message}"):
        open_data(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "objects"])
def test_damaged_files_and_pickles_are_one_line_errors(tmp_path, suffix, damage):
    path = tmp_path / f"a.{suffix}"
    images = np.array([{}, {}], object) if damage == "objects" else pixels(20, 8, 8)
    with path.open("wb") as file:
        (np.save if suffix == "npy" else np.savez)(file, images)
    content = path.read_bytes()
    if damage != "objects":
        path.write_bytes({"empty": b"", "garbage": b"not an array", "truncated": content[:500]}[damage])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: cannot be read as plain NumPy arrays") as caught:
        open_data(path)
    assert "\n" not in str(caught.value)


def refused(path, message):
    tracemalloc.start()
    with pytest.raises(UserError, match=rf"{path.name}: cannot be read as plain NumPy arrays \(.*{message}") as caught:
        open_data(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def header(text):
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text


def member(path, content, **options):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **options) as archive:
        archive.writestr("images.npy", content)
    return path


HUGE = header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000, 28, 28)}")


def test_what_an_array_claims_is_compared_before_memory_is_taken(tmp_path):
    refused(member(tmp_path / "a.npz", HUGE), "images of shape .* has 7840000000000 bytes, but 0 are stored")
    (tmp_path / "a.npy").write_bytes(HUGE)
    refused(tmp_path / "a.npy", "")
    wide = header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (" + b"9" * 30 + b",)}")
    refused(member(tmp_path / "b.npz", wide), "images of shape")
    path = member(tmp_path / "c.npz", HUGE)
    data = bytearray(path.read_bytes())
    struct.pack_into("<I", data, data.rindex(b"PK\x01\x02") + 24, 2**31)
    path.write_bytes(data)
    refused(path, "images: it claims 2147483648 bytes, more than its")


@pytest.mark.parametrize(
    "content",
    [
        b"no array",
        b"",
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': " + b"(" * 5000 + b"}"),
        header(b"{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 4, 4)}") + bytes(16),
        header(b"[]"),
        b"\x93NUMPY\x09\0" + bytes(100),
    ],
)
def test_members_that_are_no_arrays_are_refused(tmp_path, content):
    refused(member(tmp_path / "a.npz", content), "")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.npz", "w", method) as archive:
        archive.writestr("images.npy", bytes(100))
    refused(tmp_path / "a.npz", "images is compressed by method \\d+, not deflate")


def test_keys_that_are_not_used_are_named(tmp_path):
    np.savez(tmp_path / "a.npz", images=pixels(2, 4, 4), y=np.zeros(2, np.int64))
    with pytest.warns(UserWarning, match=r"a\.npz: y not used; labels are read from labels, label, arr_1"):
        assert open_data(tmp_path / "a.npz").labels is None


def test_labels_may_be_beside_a_npy_file(tmp_path):
    images = np.zeros((3, 4, 5), np.uint8)
    np.save(tmp_path / "set.npy", images)
    assert open_data(tmp_path / "set.npy").labels is None
    np.save(tmp_path / "set.labels.npy", np.array([2, 0, 1]))
    data = open_data(tmp_path / "set.npy")
    assert (data.labels.tolist(), data.num_classes) == ([2, 0, 1], 3)
    np.save(tmp_path / "set.labels.npy", np.array([2, 0]))
    with pytest.raises(UserError, match=r"set\.npy: 2 labels for 3 images"):
        open_data(tmp_path / "set.npy")
    np.save(tmp_path / "set.labels.npy", np.array([{}], object), allow_pickle=True)
    with pytest.raises(UserError, match=r"set\.npy: .*set\.labels\.npy, its labels: "):
        open_data(tmp_path / "set.npy")


@pytest.mark.parametrize("fit", ["crop", "resize", "pad"])
def test_images_of_an_array_larger_than_memory_are_fitted_when_drawn(tmp_path, monkeypatch, fit):
    images = np.random.default_rng(0).integers(0, 256, (9, 3, 4, 5), dtype=np.uint8)
    np.save(tmp_path / "set.npy", images)
    size = (6, 7) if fit == "pad" else (3, 2)
    small = open_data(tmp_path / "set.npy", size=size, fit=fit)
    monkeypatch.setattr(rows, "IN_MEMORY", 0)
    large = open_data(tmp_path / "set.npy", size=size, fit=fit)
    assert isinstance(large.storage, FittedRows)
    assert not isinstance(small.storage, FittedRows)
    np.testing.assert_array_equal(large.rows([8, 0, 8]), small.rows([8, 0, 8]))
    assert (large.fingerprint, large.shape, large.content) == (small.fingerprint, small.shape, small.content)
    with pytest.raises(UserError, match=r"not data\.size=9x9; add --fit crop"):
        open_data(tmp_path / "set.npy", size=(9, 9))
