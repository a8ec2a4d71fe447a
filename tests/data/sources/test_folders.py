import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from multistage_diffusion.data.sources import open_data


def pixels(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(array, path, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)


def zipped(folder, target):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            archive.write(path, path.relative_to(folder))
    return target


@pytest.fixture
def grey(tmp_path):
    """Five grey 4x6 images in sub-folders a and b."""
    folder = tmp_path / "set"
    for i, name in enumerate(["b/0.png", "a/1.png", "b/deep/2.PNG", "a/0.png", "a/2.png"]):
        save(pixels(i, 4, 6), folder / name)
    return folder


SORTED = [3, 1, 4, 0, 2]  # a/0, a/1, a/2, b/0, b/deep/2


def test_grey_images_sorted_by_path_with_sub_folder_labels(grey):
    data = open_data(grey)
    np.testing.assert_array_equal(data.array()[:, 0], [pixels(i, 4, 6) for i in SORTED])
    assert data.shape == (1, 4, 6)
    assert data.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.class_names == ("a", "b")
    assert data.name == str(grey)


def test_a_zip_reads_as_its_folder_and_is_not_unpacked(grey, tmp_path):
    archive = zipped(grey, tmp_path / "set.zip")
    before = sorted(tmp_path.rglob("*"))
    data, folder = open_data(str(archive)), open_data(str(grey))
    assert data.fingerprint == folder.fingerprint
    assert data.class_names == folder.class_names
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_around_everything_is_no_class(grey, tmp_path):
    assert open_data(tmp_path).class_names == ("a", "b")
    assert open_data(grey / "a").labels is None
    only = tmp_path / "x" / "only"
    save(pixels(0, 2, 2), only / "0.png")
    assert open_data(tmp_path / "x").labels is None


def test_images_beside_sub_folders_mean_no_labels(grey):
    save(pixels(9, 4, 6), grey / "loose.png")
    data = open_data(grey)
    assert data.labels is None
    assert len(data) == 6


def test_hidden_files_and_other_files_are_passed_over(grey):
    expected = open_data(grey).fingerprint
    for name in (
        ".DS_Store.png",
        "__MACOSX/a/0.png",
        ".cache/c.png",
        "@eaDir/0.png",
        "$RECYCLE.BIN/0.png",
        "c/readme.txt",
    ):
        (grey / name).parent.mkdir(exist_ok=True, parents=True)
        (grey / name).write_bytes(b"nothing")
    for source in (grey, zipped(grey, grey.parent / "set.zip")):
        with pytest.warns(UserWarning, match=r"skipped 1 file, not images \(1 \.txt\); the first is c/readme\.txt"):
            data = open_data(source)
        assert data.fingerprint == expected
        assert data.describe() == (
            f"{source}: 5 images, 2 classes, 4 x 6, grey, 6 files skipped (5 hidden or system files, 1 not images)"
        )


def test_links_are_followed_but_not_in_circles(grey, tmp_path):
    expected = open_data(grey).fingerprint
    (grey / "b" / "deep" / "up").symlink_to(grey, target_is_directory=True)
    assert open_data(grey).fingerprint == expected
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("a", "b"):
        (linked / name).symlink_to(grey / name, target_is_directory=True)
    (grey / "b" / "deep" / "up").unlink()
    assert open_data(linked).fingerprint == expected


def test_many_files_keep_their_order_and_progress_is_told(tmp_path):
    for i in range(300):
        save(np.full((2, 2), i % 256, np.uint8), tmp_path / f"{i:04}.png")
    told = []
    data = open_data(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert data.array()[:, 0, 0, 0].tolist() == [i % 256 for i in range(300)]
    assert told[-1] == (300, 300)


def test_grey_among_colour_becomes_rgb(tmp_path):
    save(pixels(0, 4, 6, 3), tmp_path / "0.png")
    save(pixels(1, 4, 6), tmp_path / "1.png")
    data = open_data(tmp_path)
    np.testing.assert_array_equal(data.array()[0], pixels(0, 4, 6, 3).transpose(2, 0, 1))
    np.testing.assert_array_equal(data.array()[1], np.stack([pixels(1, 4, 6)] * 3))


@pytest.mark.parametrize("suffix", ["bmp", "webp", "jpg", "jpeg"])
def test_other_formats_decode_as_pillow_does(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    smooth = np.linspace(0, 255, 8 * 8 * 3).reshape(8, 8, 3).astype(np.uint8)
    save(smooth, tmp_path / f"0.{suffix}", **options)
    image = open_data(tmp_path).array()[0].transpose(1, 2, 0)
    if suffix in ("bmp", "webp"):
        np.testing.assert_array_equal(image, smooth)
    else:
        assert np.abs(image.astype(int) - smooth).mean() < 12
        np.testing.assert_array_equal(image, np.asarray(Image.open(tmp_path / f"0.{suffix}")))


def test_a_palette_becomes_rgb(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "0.png")
    assert open_data(tmp_path).array()[0].transpose(1, 2, 0).tolist() == [
        [[10, 20, 30], [40, 50, 60]],
        [[70, 80, 90], [40, 50, 60]],
    ]


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 65535, 257 * 100], [128, 129, 257 * 7 + 129]], np.uint16)
    save(values, tmp_path / "0.png")
    data = open_data(tmp_path)
    assert data.array()[0, 0].tolist() == np.rint(values / 257).astype(int).tolist()
    assert data.shape[0] == 1


def test_black_and_white_has_one_channel(tmp_path):
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "0.png")
    assert open_data(tmp_path).array().tolist() == [[[[255, 0]]]]


def test_transparent_parts_become_white(tmp_path):
    save(np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], np.uint8), tmp_path / "rgba" / "0.png")
    assert open_data(tmp_path / "rgba").array()[0].transpose(1, 2, 0).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    save(np.array([[[10, 255], [10, 0], [0, 51]]], np.uint8), tmp_path / "la" / "0.png")
    assert open_data(tmp_path / "la").array().tolist() == [[[[10, 255, 204]]]]
    save(np.array([[10, 20]], np.uint8), tmp_path / "key" / "0.png", transparency=20)
    assert open_data(tmp_path / "key").array().tolist() == [[[[10, 255]]]]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    save(pixels(0, 4, 6), tmp_path / "0.png", exif=exif)
    np.testing.assert_array_equal(open_data(tmp_path).array()[0, 0], np.rot90(pixels(0, 4, 6), -1))


def test_unequal_sizes_name_both_files_and_the_mend(grey):
    save(pixels(0, 5, 6), grey / "b" / "1.png")
    message = r"a/0\.png is 4x6 but b/1\.png is 5x6 .*--size H W --fit crop"
    with pytest.raises(ValueError, match=message):
        open_data(grey)


def test_an_exact_size_must_be_met(grey):
    assert open_data(grey, size=(4, 6)).shape == (1, 4, 6)
    with pytest.raises(ValueError, match=r"a/0\.png: height x width 4x6, not data\.size=8x8; add --fit"):
        open_data(grey, size=(8, 8))


def test_crop_keeps_the_centre_without_distortion(tmp_path):
    wide, tall = np.zeros((4, 12), np.uint8), np.zeros((12, 4), np.uint8)
    wide[:, 4:8] = tall[4:8] = 200
    for name, array in {"wide": wide, "tall": tall, "same": np.full((4, 4), 200, np.uint8)}.items():
        save(array, tmp_path / f"{name}.png")
    np.testing.assert_array_equal(open_data(tmp_path, size=(4, 4), fit="crop").array(), 200)


def test_resize_keeps_the_whole_image(tmp_path):
    bars = np.repeat(np.array([0, 60, 200, 0], np.uint8), 16)
    save(np.tile(bars, (8, 1)), tmp_path / "0.png")
    image = open_data(tmp_path, size=(4, 64), fit="resize").array()[0, 0]
    np.testing.assert_array_equal(image, np.tile(bars, (4, 1)))
    assert open_data(tmp_path, size=(4, 4), fit="resize").array()[0, 0, :, 0].max() < 20


def test_resizing_mends_unequal_sizes(grey):
    save(pixels(0, 5, 7), grey / "b" / "1.png")
    for fit in ("crop", "resize"):
        assert open_data(grey, size=(3, 2), fit=fit).array().shape == (6, 1, 3, 2)


def truncate(path, share=0.6):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp"])
def test_a_truncated_image_is_named_and_can_be_skipped(tmp_path, suffix):
    for i in range(4):
        save(pixels(i, 32, 32), tmp_path / f"{'ab'[i % 2]}" / f"{i}.{suffix}")
    truncate(tmp_path / "b" / f"3.{suffix}")
    with pytest.raises(ValueError, match=rf"b/3\.{suffix} cannot be read .*--skip-bad"):
        open_data(tmp_path)
    with pytest.warns(UserWarning, match=rf"skipped 1 of 4 images: b/3\.{suffix}"):
        data = open_data(tmp_path, skip_bad=True)
    assert data.labels.tolist() == [0, 0, 1]


def test_a_bad_file_leaves_the_others_and_their_labels_in_place(grey):
    (grey / "a" / "1.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"skipped 1 of 5 .*a/1\.png"):
        data = open_data(grey, skip_bad=True)
    np.testing.assert_array_equal(data.array()[:, 0], [pixels(i, 4, 6) for i in (3, 4, 0, 2)])
    assert data.labels.tolist() == [0, 0, 1, 1]


def test_nothing_but_bad_files_is_an_error_even_when_skipping(tmp_path):
    (tmp_path / "0.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"none of its 1 images can be read; the first is 0\.png"):
        open_data(tmp_path, skip_bad=True)


def test_empty_folders_and_zips_are_errors(tmp_path):
    (tmp_path / "notes.txt").write_text("no images here")
    with pytest.raises(ValueError, match=rf"{tmp_path}: contains no images"):
        open_data(tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(ValueError, match=r"empty\.zip: contains no images"):
        open_data(tmp_path / "empty.zip")


def test_a_broken_zip_is_an_error(tmp_path, grey):
    (tmp_path / "bad.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(ValueError, match=r"bad\.zip: not a readable zip file"):
        open_data(tmp_path / "bad.zip")
    whole = zipped(grey, tmp_path / "cut.zip")
    truncate(whole)
    with pytest.raises(ValueError, match=r"cut\.zip: not a readable zip file"):
        open_data(whole)


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, 16, 16)).save(buffer, "png")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("good.png", buffer.getvalue())
        archive.writestr("hurt.png", buffer.getvalue())
    data = bytearray((tmp_path / "set.zip").read_bytes())
    data[data.rindex(b"IDAT") + 20] ^= 0xFF
    (tmp_path / "set.zip").write_bytes(data)
    with pytest.raises(ValueError, match=r"set\.zip: hurt\.png cannot be read"):
        open_data(tmp_path / "set.zip")
    with pytest.warns(UserWarning, match="skipped 1 of 2"):
        assert len(open_data(tmp_path / "set.zip", skip_bad=True)) == 1


def test_a_closed_sub_folder_is_an_error(grey, monkeypatch):
    scandir = os.scandir

    def closed(path):
        if str(path) == str(grey / "b"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(ValueError, match=r"set/b: folder cannot be listed \(Permission denied\)"):
        open_data(grey)


NAMES = ["a/0.png", "a/1.png", "a/2.png", "b/0.png", "b/deep/2.PNG"]


def list_labels(folder: Path, labels):
    (folder / "dataset.json").write_text(json.dumps(labels))


@pytest.mark.parametrize("as_zip", [False, True])
def test_dataset_json_comes_before_sub_folders(grey, tmp_path, as_zip):
    entries = [[name, label] for name, label in zip(NAMES, [4, 0, 2, 2, 1], strict=True)]
    list_labels(grey, {"labels": [*entries[::-1], ["gone.png", 7]]})
    data = open_data(zipped(grey, tmp_path / "set.zip") if as_zip else grey)
    assert data.labels.tolist() == [4, 0, 2, 2, 1]
    assert data.num_classes == 5


def test_dataset_json_may_say_that_there_are_no_labels(grey):
    list_labels(grey, {"labels": None})
    assert open_data(grey).labels is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"labels": [[name, 0] for name in NAMES[:-1]]}, r"dataset\.json has no label for b/deep/2\.PNG"),
        (
            {"labels": [[name, 0.5] for name in NAMES]},
            r"dataset\.json: label of a/0\.png is 0\.5; labels must be integers",
        ),
        ({"labels": [[name, True] for name in NAMES]}, r"dataset\.json: label of a/0\.png is True"),
        ({"labels": [[name, -1] for name in NAMES]}, "label -1 is not in"),
        ({"other": 1}, r"dataset\.json must be"),
        ({"labels": [3, 4]}, r"dataset\.json must be"),
        ([], r"dataset\.json must be"),
    ],
)
def test_a_wrong_dataset_json_is_an_error(grey, content, message):
    list_labels(grey, content)
    with pytest.raises(ValueError, match=message):
        open_data(grey)


def test_a_dataset_json_that_is_not_json_is_an_error(grey):
    (grey / "dataset.json").write_bytes(b"{\xff")
    with pytest.raises(ValueError, match=r"dataset\.json must be"):
        open_data(grey)


def test_a_closed_folder_of_the_system_is_no_matter(grey, monkeypatch):
    (grey / "lost+found").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path) == str(grey / "lost+found"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert len(open_data(grey)) == 5


@pytest.mark.parametrize("name", ["a/9.png", "dataset.json"])
def test_a_pipe_among_the_files_is_refused_without_waiting(grey, name):
    os.mkfifo(grey / name)
    with pytest.raises(ValueError, match=rf"set: {name} cannot be read \(it is a named pipe, not a file\)"):
        open_data(grey)


def test_an_image_file_that_is_too_long_is_not_read(grey):
    with (grey / "a" / "9.png").open("wb") as file:
        file.truncate(2**30 + 1)  # takes no room on disk
    with pytest.raises(
        ValueError, match=r"a/9\.png cannot be read \(it holds 1073741825 bytes, more than the 1073741824"
    ):
        open_data(grey)


def test_an_eps_under_another_name_is_unreadable(grey, monkeypatch):
    def started(*_, **__):
        raise AssertionError("another program was started")

    monkeypatch.setattr("subprocess.Popen", started)
    (grey / "a" / "9.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    with pytest.raises(ValueError, match=r"a/9\.png cannot be read \(it is not recognised as PNG or JPEG or"):
        open_data(grey)


def png():
    buffer = io.BytesIO()
    Image.fromarray(pixels(0, 2, 2)).save(buffer, "png")
    return buffer.getvalue()


def test_two_files_of_one_name_in_an_archive_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a/0.png", png())
        archive.writestr("a\\0.png", png())
    with pytest.raises(ValueError, match=r"set\.zip: contains 2 files named a/0\.png; remove all but one"):
        open_data(tmp_path / "set.zip")


def test_paths_in_archives_may_begin_with_a_dot(tmp_path):
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("./a/0.png", "./b/0.png", "/b/1.png", "../b/2.png", "b\\"):
            archive.writestr(name, png())
    assert open_data(tmp_path / "set.zip").labels.tolist() == [0, 1, 1, 1]


def test_a_folder_of_backslashes_is_read_on_systems_that_have_them_in_names(tmp_path):
    save(pixels(0, 2, 2), tmp_path / "a\\0.png")
    assert len(open_data(tmp_path)) == 1


def test_class_folders_may_hold_any_format(tmp_path):
    for i, kind in enumerate(("tif", "gif", "ppm", "jp2")):
        if kind == "jp2" and not features.check("jpg_2000"):
            continue
        save(pixels(i, 3, 4), tmp_path / kind / f"0.{kind}")
    data = open_data(tmp_path)
    np.testing.assert_array_equal(
        data.array()[:3, 0], [pixels(i, 3, 4) for i in ((1, 3, 2) if len(data) == 4 else (1, 2, 0))]
    )


def test_links_between_folders_are_followed_once(tmp_path):
    save(pixels(0, 2, 2), tmp_path / "a" / "0.png")
    save(pixels(1, 2, 2), tmp_path / "b" / "0.png")
    for here, there in ("ab", "ba"):
        for i in range(3):  # followed on and on, these would be 3 to the power of 40
            (tmp_path / here / f"link{i}").symlink_to(tmp_path / there, target_is_directory=True)
    data = open_data(tmp_path)
    assert (len(data), data.labels.tolist()) == (8, [0] * 4 + [1] * 4)


def test_folders_may_be_nested_deeply(tmp_path):
    folders = [tmp_path / "a"]
    try:
        for _ in range(1100):
            folders[-1].mkdir()
            folders.append(folders[-1] / "a")
        save(pixels(0, 2, 2), folders[-1] / "0.png")
        assert len(open_data(tmp_path)) == 1
        (folders[-1] / "0.png").unlink()
        folders[-1].rmdir()
    finally:
        for folder in folders[-2::-1]:  # what pytest removes, it removes recursively
            folder.rmdir()
