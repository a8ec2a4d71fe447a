import json

import pytest

from multistage_diffusion.data.labels import find_labels, inner_path
from multistage_diffusion.errors import UserError

IMAGES = ["a/0.png", "a/1.png", "b/2.png"]


def listed(entries, images=IMAGES, listings=("dataset.json",)):
    content = entries if isinstance(entries, bytes) else json.dumps({"labels": entries}).encode()
    return find_labels("set", images, listings, lambda name, limit: content)


def pairs(images=IMAGES):
    return [[name, i] for i, name in enumerate(images)]


def test_labels_are_matched_by_path_from_the_listings_own_folder():
    assert listed(pairs()[::-1]) == ([0, 1, 2], ())
    wrapped = [f"my/{name}" for name in IMAGES]
    assert listed(pairs(), wrapped, ["my/dataset.json"]) == ([0, 1, 2], ())
    # one folder of images below it
    assert listed([["0/x.png", 5]], ["my/0/x.png"], ["my/dataset.json"]) == ([5], ())


@pytest.mark.parametrize("form", ["{}", "./{}", "a/../{}", "/{}"])
def test_paths_have_one_form(form):
    assert listed([[form.format(name).replace("/", "\\"), i] for i, name in enumerate(IMAGES)]) == ([0, 1, 2], ())
    assert inner_path(form.format("a/0.png")) == "a/0.png"
    assert inner_path("../../etc/passwd") == "etc/passwd"


@pytest.mark.parametrize("listing", ["a/dataset.json", "c/dataset.json", "a/x/dataset.json"])
def test_a_listing_beside_the_images_is_refused_by_name(listing):
    with pytest.raises(
        UserError,
        match=rf"set: {listing} is not in a folder that contains all images \((a/0\.png|b/2\.png) is outside\)",
    ):
        listed(pairs(), IMAGES, [listing])


def test_of_two_listings_none_is_used():
    with pytest.raises(UserError, match=r"set: contains dataset\.json and my/dataset\.json; keep the one"):
        listed(pairs(), ["my/a.png"], ["dataset.json", "my/dataset.json"])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([*pairs(), ["a/1.png", 2]], r"set: dataset\.json labels a/1\.png twice, 1 and 2; keep one"),
        ([*pairs(), ["a\\1.png", 1]], r"labels a\\1\.png twice, 1 and 1"),
        ([*pairs(), ["./gone.png", 1], ["gone.png", 1]], r"labels gone\.png twice"),
        (pairs()[:2], r"set: dataset\.json has no label for b/2\.png; add it"),
        ([[name, 10**30] for name in IMAGES], r"label of a/0\.png is 1000.*; labels must be integers"),
        ([[name, None] for name in IMAGES], r"label of a/0\.png is None; labels must"),
        ([[name, [0, 1]] for name in IMAGES], r"label of a/0\.png is \[0, 1\]; labels must"),
        ({name: 0 for name in IMAGES}, r"must be .*labels is no list: \{'a/0\.png'"),
        ("ab", r"must be .*labels is no list: ab"),
        (["ab"], r"must be .*no \[path, class\] pair: ab"),
        ([[0, "a/0.png"]], r"must be .*no \[path, class\] pair: \[0, 'a/0\.png'\]"),
        (b'{"labels": [], "labels": null}', r"must be .*duplicate key 'labels'"),
        (b"[" * 100_000, "must be .*(recursion|depth)"),
        (b'{"labels": [["a/0.png", ' + b"9" * 5000 + b"]]}", "must be"),
        (b"", "must be"),
    ],
)
def test_a_wrong_listing_is_refused_in_one_line(entries, message):
    with pytest.raises(UserError, match=message) as caught:
        listed(entries)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_no_labels_means_none_whatever_the_folders():
    assert listed(None) == (None, ())
    assert find_labels("set", IMAGES, [], lambda *_: b"") == ([0, 0, 1], ("a", "b"))


def test_a_listing_that_cannot_be_read_is_named_with_the_mend():
    def broken(name, limit):
        assert limit == 2**28
        raise NotImplementedError("compression type 9 (deflate64)")

    with pytest.raises(
        UserError, match=r"set: dataset\.json cannot be read \(compression type 9.*repair it, or remove it"
    ):
        find_labels("set", IMAGES, ["dataset.json"], broken)


def test_a_listing_may_name_the_classes():
    def named(names):
        content = json.dumps({"labels": pairs(), "class_names": names}).encode()
        return find_labels("set", IMAGES, ("dataset.json",), lambda name, limit: content)

    assert named(["cat", "dog", "eel", "owl"]) == ([0, 1, 2], ("cat", "dog", "eel", "owl"))
    for wrong in ("cat", [1, 2, 3], {"cat": 0}):
        with pytest.raises(UserError, match=r"dataset\.json must be .*class_names is no list of names"):
            named(wrong)
