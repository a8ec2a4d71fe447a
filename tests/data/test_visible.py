import warnings

import pytest

from multistage_diffusion.data import visible
from multistage_diffusion.data.visible import check_images, of_the_system, sort_out
from multistage_diffusion.errors import UserError


@pytest.mark.parametrize(
    "name",
    [
        ".hidden",
        "._0.png",
        ".DS_Store",
        "__MACOSX",
        "@eaDir",
        "$RECYCLE.BIN",
        "System Volume Information",
        "lost+found",
        "Thumbs.db",
        "desktop.ini",
        "Desktop.ini",
    ],
)
def test_files_and_folders_of_the_system_are_none_of_the_data(name):
    assert of_the_system(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = sort_out("set", ["a/0.png", f"a/{name}", f"{name}/0.png", f"{name}/b/1.png", f"{name}/dataset.json"])
    assert (found.images, found.listings) == (["a/0.png"], [])
    assert found.skipped == {"hidden or system files": 2}  # a hidden folder counts as one


def test_images_and_listings_are_found_whatever_their_case():
    found = sort_out("set", ["b.TIF", "a.JPEG", "x/dataset.json", "c.avif"])
    assert found.listings == ["x/dataset.json"]
    assert found.images[:2] == ["a.JPEG", "b.TIF"]


def test_other_files_are_counted_and_named():
    names = ["0.png", "b.txt", "a.md", "c.md", "README", "labels.csv", ".git/x"]
    with pytest.warns(
        UserWarning,
        match=r"set: skipped 5 files, not images \(2 \.md, 1 \.txt, 1 no suffix, 1 \.csv\); the first is README",
    ):
        found = sort_out("set", names)
    assert found.skipped == {"hidden or system files": 1, "not images": 5}


def test_photos_of_other_formats_are_to_be_converted():
    with pytest.warns(
        UserWarning,
        match=r"skipped 2 files, in formats that are not read \(.*the first is .*; convert them to JPEG or PNG$",
    ):
        found = sort_out("set", ["0.png", "IMG_1.HEIC", "b/2.nef"])
    assert found.images == ["0.png"]


def test_a_folder_without_images_says_what_it_holds():
    with (
        pytest.warns(UserWarning, match="not images"),
        pytest.raises(UserError, match=r"set: contains no images .*; 1 file passed over: hidden"),
    ):
        check_images("set", sort_out("set", [".thumbs/1.png", "a.txt"]))


def test_formats_that_this_pillow_lacks_are_named(monkeypatch):
    monkeypatch.setattr(visible, "supported", lambda: frozenset({"PNG"}))
    with pytest.warns(UserWarning, match=r"skipped 1 file, in formats that this Pillow cannot read \(1 \.avif\)"):
        found = sort_out("set", ["0.png", "1.avif"])
    assert found.images == ["0.png"]
    assert found.skipped == {"in formats that this Pillow cannot read": 1}
