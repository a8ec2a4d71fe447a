from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import PixelFeatures, extract
from multistage_diffusion.evaluation.reference import load_reference, make_reference, save_reference


def images(count: int = 20, size: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, size, size), generator=g, dtype=torch.uint8)


def reference(keep: int = 7):
    return make_reference(
        PixelFeatures(), images(), data="noise", fingerprint="abc", part="train", held_out=0.1, keep=keep
    )


def test_statistics_are_of_all_images_and_keep_the_features_of_some() -> None:
    calls: list[tuple[int, int]] = []
    made = make_reference(
        PixelFeatures(), images(), data="noise", fingerprint="abc", keep=7, progress=lambda *c: calls.append(c)
    )
    features = extract(PixelFeatures(), images()).double()
    assert torch.allclose(made.moments.mean, features.mean(dim=0))
    assert torch.allclose(made.moments.covariance, torch.cov(features.T))
    assert made.moments.count == 20
    assert made.features is not None
    assert made.features.shape == (7, 9)
    rows = [int((features == row).all(dim=1).nonzero()) for row in made.features.double()]
    assert len(set(rows)) == 7  # seven different images
    assert rows != sorted(rows)  # drawn, not the first
    assert calls[-1] == (20, 20)
    few = make_reference(PixelFeatures(), images(), data="noise", fingerprint="abc", keep=1000)
    assert few.features is not None
    assert len(few.features) == 20
    assert make_reference(PixelFeatures(), images(), data="noise", fingerprint="abc").features is None


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    made, path = reference(), tmp_path / "reference.npz"
    save_reference(made, path)
    found = load_reference(path)
    assert torch.equal(found.moments.mean, made.moments.mean)
    assert torch.equal(found.moments.covariance, made.moments.covariance)
    assert found.features is not None
    assert made.features is not None
    assert torch.equal(found.features, made.features)
    told = ("extractor", "preprocessing", "data", "part", "fingerprint", "shape", "held_out")
    assert {name: getattr(found, name) for name in told} == {
        "extractor": "pixels",
        "preprocessing": PixelFeatures.preprocessing,
        "data": "noise",
        "part": "train",
        "fingerprint": "abc",
        "shape": (1, 3, 3),
        "held_out": 0.1,
    }
    assert found.moments.count == 20
    assert found.source == str(path)
    assert list(tmp_path.iterdir()) == [path]


def test_edm_s_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "cifar10-32x32.npz"
    np.savez(path, mu=np.arange(9.0), sigma=np.eye(9))
    found = load_reference(path)
    assert torch.equal(found.moments.mean, torch.arange(9.0).double())
    assert (found.moments.count, found.extractor, found.fingerprint, found.features) == (0, None, None, None)
    found.require(PixelFeatures(), "whatever", (1, 3, 3))
    with pytest.raises(ValueError, match=r"cifar10-32x32.npz: has 9 feature dimensions, but pixels has 16"):
        found.require(PixelFeatures(), "whatever", (1, 4, 4))


class Others(PixelFeatures):
    name = "others"


class Cropped(PixelFeatures):
    preprocessing = "cropped"


@pytest.mark.parametrize(
    ("extractor", "fingerprint", "shape", "message"),
    [
        (Others(), "abc", (1, 3, 3), "computed with features pixels, but the samples have others"),
        (Cropped(), "abc", (1, 3, 3), "computed with preprocessing .*, but the samples have cropped"),
        (PixelFeatures(), "xyz", (1, 3, 3), "computed with data fingerprint abc, but the samples have xyz"),
        (
            PixelFeatures(),
            "abc",
            (1, 4, 4),
            r"computed with image shape \(C, H, W\) \(1, 3, 3\), but the samples have \(1, 4, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(extractor, fingerprint: str, shape: tuple[int, ...], message: str) -> None:
    reference().require(PixelFeatures(), "abc", (1, 3, 3))
    with pytest.raises(ValueError, match=f"{message}.*msdiff stats"):
        reference().require(extractor, fingerprint, shape)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (None, "no such file"),
        (b"nonsense", "not an .npz file of statistics"),
        ({"mu": np.zeros(3)}, "sigma is missing, the covariance"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"mu of shape \(3,\) and sigma of shape \(4, 4\)"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "with finite values"),
        ({"mu": np.zeros(3), "sigma": np.array([[Bomb()]], dtype=object)}, "not an .npz file of statistics"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "msdiff": np.array("{")}, "not an .npz file of statistics"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "msdiff": np.array('{"format_version": 9}')}, "format_version=9"),
    ],
)
def test_broken_files_are_one_clear_line(arrays, message: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = Path("reference.npz")
    if isinstance(arrays, bytes):
        path.write_bytes(arrays)
    elif arrays is not None:
        np.savez(path, **arrays)
    with pytest.raises(ValueError, match=f"reference.npz: .*{message}") as caught:
        load_reference(path)
    assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


def test_one_image_has_no_covariance() -> None:
    with pytest.raises(ValueError, match="noise: 1 images have no covariance"):
        make_reference(PixelFeatures(), images(1), data="noise", fingerprint="abc")


def test_members_of_other_kinds_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    good = {"mu": np.zeros(3), "sigma": np.eye(3)}
    odd: list[dict[str, object]] = [
        {"mu": np.array(["a", "b", "c"])},
        {"mu": np.zeros(3, complex)},
        {"mu": np.full(3, np.nan)},
        {"mu": np.zeros(())},
        {"mu": np.array([None] * 3)},
        {"features": np.zeros(3)},
        {"features": np.zeros((2, 4))},
        {"features": np.full((2, 3), np.inf)},
        {"features": np.array([["a", "b", "c"]])},
        {"msdiff": np.zeros(3)},
    ]
    told: list[object] = [[], 1, {"count": -1}, {"count": "x"}, {"count": 10**30}, {"shape": 3}, {"shape": ["a"]}]
    told += [{"extractor": 1}, {"format_version": [2]}, {"held_out": "x"}, {"fingerprint": []}]
    odd += [{"msdiff": np.array(json.dumps(about))} for about in told]
    odd += [{"msdiff": np.array("[" * 100_000)}]
    for change in odd:
        np.savez(path, **{**good, **change})  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"^[^\n]*reference.npz: [^\n]*$") as caught:
            load_reference(path)
        assert len(str(caught.value)) < 500
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mu", b"text")
        archive.writestr(
            "sigma.npy", b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (10**9,)}"
        )
    with pytest.raises(UserError, match=r"reference\.npz: "):
        load_reference(path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match=r"reference\.npz: it is a named pipe"):
        load_reference(path)
