import os
import time
import warnings

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data import ImageData, index, kept_indexes, rows
from multistage_diffusion.data.options import Options
from multistage_diffusion.data.sources import open_data


@pytest.fixture(autouse=True)
def fixture_cache(tmp_path, monkeypatch):
    """Keep every index, in a folder of the test, even those of files that have just been written."""
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_indexes, "WORTH", 0.0)
    monkeypatch.setattr(kept_indexes, "SETTLED", -(10**9))


@pytest.fixture(name="folder")
def fixture_folder(tmp_path):
    """Twelve images in two classes; one file is bad."""
    for i in range(12):
        path = tmp_path / "set" / "ab"[i % 2] / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (4, 6, 3), dtype=np.uint8)).save(path)
    (tmp_path / "set" / "a" / "10.png").write_bytes(b"bad")
    return tmp_path / "set"


@pytest.fixture(name="passes")
def fixture_passes(monkeypatch):
    """The number of files of every pass over a data set."""
    made, make_index = [], index.make_index

    def counted(files, labels, options):
        made.append(len(files.names))
        return make_index(files, labels, options)

    monkeypatch.setattr(kept_indexes, "make_index", counted)
    return made


def opened(folder, **options):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        data = open_data(folder, skip_bad=True, **options)
    return data, [str(warning.message) for warning in told]


def same(first, second):
    np.testing.assert_array_equal(first.array(), second.array())
    assert first.labels.tolist() == second.labels.tolist()
    assert first.fingerprint == second.fingerprint
    assert first.describe() == second.describe()
    for own, others in zip(first.split(0.4), second.split(0.4), strict=True):
        np.testing.assert_array_equal(own.array(), others.array())


@pytest.mark.parametrize("in_memory", [True, False])
def test_the_second_opening_reads_the_index_and_is_the_same(folder, passes, in_memory, monkeypatch):
    monkeypatch.setattr(rows, "IN_MEMORY", 1 << 20 if in_memory else 0)
    first, told = opened(folder)
    second, again = opened(folder)
    assert passes == [12]
    assert told == again
    assert "skipped 1 of 12 images" in told[0]
    same(first, second)


def kept(tmp_path):
    return sorted((tmp_path / "cache" / "indexes").glob("*.safetensors"))


def test_other_options_have_another_index(folder, passes, tmp_path):
    for options in ({}, {"size": (2, 2), "fit": "crop"}, {"size": (2, 2), "fit": "resize"}, {"max_pixels": 99}):
        opened(folder, **options)
    assert passes == [12] * 4
    assert len(kept(tmp_path)) == 4


def change(path, how):
    if how == "another length":
        path.write_bytes((path.parent / "00.png").read_bytes() + b"x")
    elif how == "a file more":
        path.with_name("99.png").write_bytes(path.read_bytes())
    elif how == "a file less":
        path.unlink()
    elif how == "another name":
        path.rename(path.with_name("98.png"))
    elif how == "same length and time":  # its attributes still tell
        times = path.stat()
        path.write_bytes(bytes(reversed(path.read_bytes())))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif how == "another class":
        path.rename(path.parents[1] / "b" / path.name)


@pytest.mark.parametrize(
    "how",
    ["another length", "a file more", "a file less", "another name", "same length and time", "another class"],
)
def test_a_changed_data_set_is_indexed_again(folder, passes, tmp_path, how):
    opened(folder)
    time.sleep(0.02)  # clocks of file systems are coarse
    change(folder / "a" / "02.png", how)
    found, _ = opened(folder)
    assert len(passes) == 2
    assert len(kept(tmp_path)) == 1
    kept(tmp_path)[0].unlink()
    same(found, opened(folder)[0])


def test_other_labels_or_another_decoder_make_a_new_index(folder, passes, monkeypatch):
    opened(folder)
    (folder / "dataset.json").write_text('{"labels": null}')
    assert opened(folder)[0].labels is None
    assert len(passes) == 2
    monkeypatch.setattr(kept_indexes.PIL, "__version__", "another")
    opened(folder)
    assert len(passes) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "a bit", "text"])
def test_a_damaged_index_is_made_again(folder, passes, tmp_path, damage):
    first, _ = opened(folder)
    (path,) = kept(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "a bit":
        content[-3] ^= 4
    path.write_bytes({"empty": b"", "cut": content[:-9], "a bit": content, "text": b"no index"}[damage])
    second, told = opened(folder)
    assert len(passes) == 2
    assert any("damaged" in text and "made again" in text for text in told)
    same(first, second)
    opened(folder)
    assert len(passes) == 2


def test_an_index_that_is_made_at_once_or_of_files_just_written_is_not_kept(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(kept_indexes, "WORTH", 60.0)
    opened(folder)
    monkeypatch.setattr(kept_indexes, "WORTH", 0.0)
    monkeypatch.setattr(kept_indexes, "SETTLED", 3600 * 10**9)
    opened(folder)
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_costs_only_a_warning(folder, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "file" / "below"))
    data, told = opened(folder)
    assert len(data) == 11
    assert any("the index of the images cannot be kept" in text and "MSDIFF_CACHE" in text for text in told)


def test_files_of_unknown_times_have_no_index(passes):
    buffer = index.ImageFiles("set", ["a"], lambda _: b"P5\n1 1\n255\n\7")
    for _ in range(2):
        assert kept_indexes.find_index(buffer, None, Options()).pixels.tolist() == [[[[7]]]]
    assert passes == [1, 1]


@pytest.fixture(name="hashed")
def fixture_hashed(monkeypatch):
    """The number of images of every computed fingerprint of a part."""
    sizes, compute = [], ImageData._fingerprint

    def counted(data):
        sizes.append(len(data))
        return compute(data)

    monkeypatch.setattr(ImageData, "_fingerprint", counted)
    return sizes


def test_fingerprints_of_parts_are_computed_once(folder, hashed, monkeypatch):
    monkeypatch.setattr(rows, "IN_MEMORY", 0)
    training, held_out = opened(folder)[0].split(0.4)
    found = [training.fingerprint, held_out.fingerprint, training.subset([1, 0]).fingerprint]
    assert hashed == [len(training), len(held_out), 2]
    assert found[0] == ImageData(training.array(), training.labels, "array").fingerprint
    hashed.clear()
    again, others = opened(folder)[0].split(0.4)
    assert [again.fingerprint, others.fingerprint, again.subset([1, 0]).fingerprint] == found
    assert hashed == []
    assert again.subset([0, 1]).fingerprint != found[2]


@pytest.mark.parametrize("damage", ["text", "a value", "other images"])
def test_damaged_fingerprints_of_parts_are_computed_again(folder, hashed, damage, tmp_path):
    training, _ = opened(folder)[0].split(0.4)
    expected = training.fingerprint
    (path,) = (tmp_path / "cache" / "indexes").glob("*.json")
    if damage == "other images":
        time.sleep(0.02)
        change(folder / "a" / "02.png", "same length and time")
        (folder / "a" / "02.png").write_bytes((folder / "a" / "00.png").read_bytes())
    else:
        path.write_text("{]" if damage == "text" else path.read_text().replace(expected, expected[::-1]))
    hashed.clear()
    found, _ = opened(folder)[0].split(0.4)
    assert (found.fingerprint == expected) == (damage != "other images")
    assert len(hashed) == 1
