"""Sizes of images before the data set is opened."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from PIL import Image

from multistage_diffusion.data.peek import image_sizes
from multistage_diffusion.errors import UserError


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for number in range(10):
        Image.new("RGB", (20 + number, 10)).save(folder / "sub" / f"{number}.png")
    return folder


def test_sizes_are_height_and_width(photos: Path) -> None:
    assert image_sizes(photos) == [(10, 20 + number) for number in range(10)]


def test_few_evenly_spaced_images_are_enough(photos: Path) -> None:
    assert image_sizes(photos, 4) == [(10, 20), (10, 23), (10, 26), (10, 29)]


def test_a_zip_file_has_the_sizes_of_its_folder(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for file in sorted((photos / "sub").iterdir()):
            archive.write(file, file.name)
    assert image_sizes(tmp_path / "photos.zip") == image_sizes(photos)


def test_an_image_that_is_turned_when_opened_has_the_turned_size(tmp_path: Path) -> None:
    image = Image.new("RGB", (30, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # a quarter turn
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert image_sizes(tmp_path) == [(30, 10)]


def test_broken_files_are_left_out(photos: Path) -> None:
    (photos / "broken.png").write_bytes(b"no image")
    assert len(image_sizes(photos)) == 10


def test_a_folder_without_images_has_no_sizes(tmp_path: Path) -> None:
    assert image_sizes(tmp_path) == []


def test_a_broken_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos.zip").write_bytes(b"PK no archive")
    with pytest.raises(UserError, match="not a readable zip file"):
        image_sizes(tmp_path / "photos.zip")
