import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data import kept_indexes, rows
from multistage_diffusion.data.sources import located, open_data
from multistage_diffusion.errors import UserError


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)


def png(seed):
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "png")
    return buffer.getvalue()


def tar(path, members, **options):
    """Write a tar file of (name, content) pairs, in that order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def sample(seed, label, suffix="cls"):
    content = str(label) if suffix == "cls" else json.dumps(label)
    return [(f"{seed:03}.png", png(seed)), (f"{seed:03}.{suffix}", content.encode()), (f"{seed:03}.txt", b"a caption")]


def images(*seeds):
    return np.stack([pixels(seed).transpose(2, 0, 1) for seed in seeds])


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_file_reads_as_the_folder_it_holds(tmp_path, form):
    members = [(f"set/{'ab'[i % 2]}/{'y' * 60}/{i}-{'x' * 60}.png", png(i)) for i in (3, 0, 2, 1)]
    path = tar(tmp_path / "set.tar", [*members, ("set/.hidden.png", b"")], format=form)
    for name, content in members:
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    found, folder = open_data(path), open_data(tmp_path / "folder")
    assert found.fingerprint == folder.fingerprint
    assert found.labels.tolist() == [0, 0, 1, 1]
    assert found.class_names == ("a", "b")
    assert found.describe() == f"{path}: 4 images, 2 classes, 4 x 6, colour, 1 file skipped (1 hidden or system files)"


def test_a_dataset_json_in_a_tar_file_tells_the_labels(tmp_path):
    listing = json.dumps({"labels": [["0.png", 1], ["1.png", 0]]}).encode()
    path = tar(tmp_path / "set.tar", [("0.png", png(0)), ("1.png", png(1)), ("dataset.json", listing)])
    assert open_data(path).labels.tolist() == [1, 0]


@pytest.mark.parametrize("suffix", ["cls", "json"])
@pytest.mark.parametrize("source", ["{0}", "{0}/train-{{00..01}}.tar"])
def test_shards_have_labels_beside_their_images(tmp_path, suffix, source):
    labels = {0: 2, 1: 0, 2: 1, 3: 2} if suffix == "cls" else {i: {"label": i % 3, "text": "x"} for i in range(4)}
    tar(tmp_path / "train-00.tar", [*sample(1, labels[1], suffix), *sample(0, labels[0], suffix)])
    tar(tmp_path / "train-01.tar", [*sample(3, labels[3], suffix), *sample(2, labels[2], suffix)])
    data = open_data(f"webdataset:{source.format(tmp_path)}")
    np.testing.assert_array_equal(data.array(), images(0, 1, 2, 3))
    assert data.labels.tolist() == ([2, 0, 1, 2] if suffix == "cls" else [0, 1, 2, 0])
    assert data.skipped == {}


def test_names_of_shards_are_no_classes(tmp_path):
    for i in range(2):
        tar(tmp_path / f"{i}.tar", [("0.png", png(i))])
    data = open_data(f"webdataset:{tmp_path}")
    assert (len(data), data.labels) == (2, None)
    for i in range(2):
        tar(tmp_path / f"{i}.tar", [("a/0.png", png(i)), ("b/0.png", png(i + 2))])
    assert open_data(f"webdataset:{tmp_path}").labels.tolist() == [0, 1, 0, 1]


def test_json_without_a_label_means_none(tmp_path):
    path = tar(tmp_path / "set.tar", [*sample(0, {"width": 6}, "json"), *sample(1, [1, 2], "json")])
    assert open_data(path).labels is None


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([*sample(0, 1), ("001.png", png(1))], r"001\.png has no label in a file 001\.cls or \.json, but others have"),
        (sample(0, "one"), r"000\.cls cannot be read as a label"),
        (sample(0, {"label": 1.5}, "json"), r"000\.json cannot be read as a label \(it is 1\.5, no whole number"),
        (sample(0, -1), r"label -1 is not in"),
        ([("a.txt", b"")], "contains no images"),
        ([("0.png", png(0)), ("./0.png", png(1))], r"contains two files named 0\.png"),
        ([("0.png", b"no image")], r"0\.png cannot be read"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not images")
def test_what_is_wrong_is_named(tmp_path, members, message):
    path = tar(tmp_path / "set.tar", members)
    with pytest.raises(UserError, match=rf"set\.tar: .*{message}"):
        open_data(path)


def test_links_in_a_tar_file_are_passed_over(tmp_path):
    path = tar(tmp_path / "set.tar", [("0.png", png(0))])
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("1.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    assert len(open_data(path)) == 1


@pytest.mark.parametrize("content", [b"", b"no tar file" * 100])
def test_a_broken_tar_file_is_an_error(tmp_path, content):
    (tmp_path / "set.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"set\.tar: (not a readable, uncompressed tar file|contains no images)"):
        open_data(tmp_path / "set.tar")


def test_a_compressed_tar_file_is_refused(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("0.png"))
    with pytest.raises(UserError, match=r"set\.tar: not a readable, uncompressed tar file"):
        open_data(tmp_path / "set.tar")


def test_a_tar_file_that_is_cut_short_names_the_image(tmp_path):
    path = tar(tmp_path / "set.tar", [("0.png", png(0)), ("1.png", png(1))])
    os.truncate(path, path.stat().st_size // 2 - 512 * 9)
    with pytest.raises(UserError, match=r"set\.tar"):
        open_data(path)


@pytest.mark.parametrize("rest", ["", "absent", "{5..1}.tar", "{0..99999999}.tar"])
def test_shards_that_are_not_there_are_an_error(tmp_path, monkeypatch, rest):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="webdataset:"):
        open_data(f"webdataset:{rest}")
    with pytest.raises(UserError, match=r"no \.tar files there"):
        open_data("webdataset:empty")
    with pytest.raises(UserError, match=r"shard-1\.tar: no such file"):
        open_data("webdataset:shard-{1..2}.tar")


def test_places_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    home = Path(tmp_path).resolve()
    assert located("webdataset:shards") == f"webdataset:{home}/shards"
    assert located("webdataset:shards/a-{00..12}.tar") == f"webdataset:{home}/shards/a-{{00..12}}.tar"
    assert located("webdataset:a-{00..12}.tar") == f"webdataset:{home}/a-{{00..12}}.tar"


def test_shards_are_read_when_drawn_and_indexed_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_indexes, "WORTH", 0.0)
    monkeypatch.setattr(kept_indexes, "SETTLED", -(10**9))
    monkeypatch.setattr(rows, "IN_MEMORY", 0)
    for i in range(2):
        tar(tmp_path / "shards" / f"{i}.tar", [*sample(2 * i, i), *sample(2 * i + 1, i)])
    first = open_data(f"webdataset:{tmp_path / 'shards'}")
    monkeypatch.setattr(kept_indexes, "make_index", lambda *_: pytest.fail("the index was made again"))
    second = open_data(f"webdataset:{tmp_path / 'shards'}")
    assert first.fingerprint == second.fingerprint
    np.testing.assert_array_equal(second.rows([3, 0]), images(3, 0))
    tar(tmp_path / "shards" / "1.tar", sample(7, 0))
    with pytest.raises(UserError, match=r"1\.tar/002\.png cannot be read any more \(it has changed since"):
        second.rows([2])
