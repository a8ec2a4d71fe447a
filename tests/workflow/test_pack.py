from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_config

from multistage_diffusion.config import DataConfig
from multistage_diffusion.data import ImageData
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.pack import pack


def photos(folder: Path, shape: tuple[int, ...] = (9, 12, 3), classes: tuple[str, ...] = ("cats", "dogs")) -> Path:
    for i in range(20):
        path = folder / classes[i % len(classes)] / f"{i:02}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return folder


SIZE = {"size": (4, 4), "fit": "crop"}


def losses(data: ImageData, path: Path) -> list[str]:
    training, held_out = data.split(0.2)
    config = tiny_config(network__channels=data.shape[0], network__num_classes=data.num_classes)
    trainer = Trainer(Run.create(path, config), training, held_out, device="cpu")
    trainer.fit()
    lines = trainer.run.metrics_file.read_text().splitlines()
    return [str(record["loss"]) for record in map(json.loads, lines) if "loss" in record]


@pytest.mark.parametrize("kind", ["zip", "npy"])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("shape", [(9, 12, 3), (9, 12)])
def test_a_packed_data_set_is_the_same(tmp_path: Path, kind: str, labelled: bool, shape: tuple[int, ...]) -> None:
    folder = photos(tmp_path / "photos", shape, ("cats", "dogs", "owls") if labelled else ("all",))
    told: list[tuple[int, int]] = []
    out = tmp_path / f"packed.{kind}"
    given = pack(DataConfig(source=str(folder), **SIZE), out, progress=lambda *found: told.append(found))
    original, found = open_data(folder, **SIZE), open_data(out)
    assert given.fingerprint == original.fingerprint == found.fingerprint
    np.testing.assert_array_equal(found.array(), original.array())
    assert (found.labels is not None) == labelled
    assert found.num_classes == original.num_classes
    assert found.class_names == original.class_names
    assert told[-1] == (20, 20)


@pytest.mark.parametrize("kind", ["zip", "npy"])
def test_a_packed_data_set_trains_as_the_original(tmp_path: Path, kind: str) -> None:
    original = open_data(photos(tmp_path / "photos"), **SIZE)
    pack(original, tmp_path / f"packed.{kind}")
    found = losses(open_data(tmp_path / f"packed.{kind}"), tmp_path / "packed")
    assert found == losses(original, tmp_path / "original")
    assert len(found) == 4


def test_a_zip_file_has_the_layout_of_edm(tmp_path: Path) -> None:
    data = ImageData(np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4), np.array([1, 0]), "set")
    pack(data, tmp_path / "set.zip")
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        assert archive.namelist() == ["00000/img00000000.png", "00000/img00000001.png", "dataset.json"]
        listed = json.loads(archive.read("dataset.json"))
        assert listed["labels"] == [["00000/img00000000.png", 1], ["00000/img00000001.png", 0]]
        assert all(member.compress_type == zipfile.ZIP_STORED for member in archive.infolist())
        with archive.open("00000/img00000001.png") as file:
            np.testing.assert_array_equal(np.asarray(Image.open(file)).transpose(2, 0, 1), data.array()[1])
    first = (tmp_path / "set.zip").read_bytes()
    pack(data, tmp_path / "set.zip", overwrite=True)
    assert (tmp_path / "set.zip").read_bytes() == first


def test_images_in_a_thousand_folders_of_the_zip_keep_their_order(tmp_path: Path) -> None:
    data = ImageData(np.arange(1100).astype("<u2").view(np.uint8).reshape(1100, 1, 1, 2), None, "set")
    pack(data, tmp_path / "set.zip")
    np.testing.assert_array_equal(open_data(tmp_path / "set.zip").array(), data.array())
    assert open_data(tmp_path / "set.zip").labels is None


@pytest.mark.parametrize("kind", ["zip", "npy"])
def test_nothing_is_overwritten_unless_asked(tmp_path: Path, kind: str) -> None:
    data = ImageData(np.zeros((2, 1, 4, 4), np.uint8), np.array([1, 0]), "set")
    out = tmp_path / f"set.{kind}"
    pack(data, out)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    if kind == "npy":
        out.unlink()  # its labels alone are in the way, too
        before.pop(out)
    with pytest.raises(UserError, match=r"--out .*set\.\S+: exists; choose another name or give --overwrite"):
        pack(data, out)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    pack(data.subset([0]), out, overwrite=True)
    assert open_data(out).labels.tolist() == [1]
    pack(ImageData(np.zeros((3, 1, 4, 4), np.uint8), None, "set"), out, overwrite=True)
    assert open_data(out).labels is None


@pytest.mark.parametrize("kind", ["zip", "npy"])
def test_ctrl_c_leaves_nothing(tmp_path: Path, kind: str) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(ImageData(np.zeros((2, 1, 4, 4), np.uint8), None, "set"), tmp_path / f"a.{kind}", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_another_suffix_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape("must end in .zip or .npy")):
        pack("no such source", tmp_path / "set.tar")


@pytest.mark.parametrize("width", [1, 3])
def test_an_array_that_could_be_read_in_two_ways_is_refused(tmp_path: Path, width: int) -> None:
    data = ImageData(np.zeros((2, 3, 4, width), np.uint8), None, "set")
    with pytest.raises(UserError, match=rf"{width} pixels wide could be read in two ways; name a \.zip file"):
        pack(data, tmp_path / "set.npy")
    assert not list(tmp_path.iterdir())
    pack(data, tmp_path / "set.zip")
    assert open_data(tmp_path / "set.zip").shape == (3, 4, width)


@pytest.mark.parametrize("text", ["[]", '{"class_names": ["one"]}', '{"class_names": [1, 2]}', "{"])
def test_wrong_class_names_beside_an_array_are_named(tmp_path: Path, text: str) -> None:
    pack(ImageData(np.zeros((2, 1, 4, 4), np.uint8), np.array([1, 0]), "set", ("a", "b")), tmp_path / "set.npy")
    assert open_data(tmp_path / "set.npy").class_names == ("a", "b")
    (tmp_path / "set.labels.json").write_text(text)
    with pytest.raises(UserError, match=r"set\.labels\.json"):
        open_data(tmp_path / "set.npy")
