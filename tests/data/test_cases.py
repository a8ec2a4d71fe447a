"""Small inputs that were once read wrongly, as files (see tests/data/cases)."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError

CASES = Path(__file__).parent / "cases"


def test_a_wrapped_data_set_has_the_labels_of_its_listing():
    data = open_data(CASES / "edm_wrapped.zip")
    assert data.labels.tolist() == [0, 1, 2] * 4
    assert data.num_classes == 3
    with zipfile.ZipFile(CASES / "edm_wrapped.zip") as archive, archive.open("mydata/00001/img00000006.png") as file:
        np.testing.assert_array_equal(data.array()[6].transpose(1, 2, 0), np.asarray(Image.open(file).convert("RGB")))


def test_a_wrapped_folder_reads_as_its_archive(tmp_path):
    with zipfile.ZipFile(CASES / "edm_wrapped.zip") as archive:
        archive.extractall(tmp_path)
    archived = open_data(CASES / "edm_wrapped.zip")
    assert open_data(tmp_path).fingerprint == open_data(tmp_path / "mydata").fingerprint == archived.fingerprint
    (tmp_path / "mydata" / "dataset.json").rename(tmp_path / "mydata" / "00000" / "dataset.json")
    with pytest.raises(UserError, match=r"mydata/00000/dataset\.json is not in a folder that contains all images"):
        open_data(tmp_path)


def test_backslashes_part_folders():
    data = open_data(CASES / "win.zip")
    assert data.class_names == ("cats", "dogs")
    assert data.labels.tolist() == [0] * 6 + [1] * 6
    assert open_data(CASES / "win_json.zip").labels.tolist() == [0, 1] * 6


def test_what_is_encrypted_is_named_with_the_mend():
    with pytest.raises(
        UserError, match=r"enc\.zip: dataset\.json cannot be read \(it is encrypted; unpack the archive"
    ):
        open_data(CASES / "enc.zip")


def test_all_safe_formats_are_read():
    data = open_data(CASES / "cls_fmt")
    assert data.class_names == ("apples", "pears", "plums")
    assert np.bincount(data.labels).tolist() == [4, 4, 4]
    assert "12 images, 3 classes" in data.describe()
