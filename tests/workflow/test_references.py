"""References: batches of images in .npz files beside statistics."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from multistage_diffusion.config import DataConfig
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import PixelFeatures, load_reference, moments
from multistage_diffusion.workflow.evaluate import statistics
from multistage_diffusion.workflow.references import is_batch, read_reference

CPU = torch.device("cpu")


@pytest.fixture(name="images")
def fixture_images() -> npt.NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), dtype=np.uint8)


def test_statistics_of_a_batch_are_of_all_its_rows(images: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", images)  # as ADM writes it: arr_0, uint8 (N, H, W, 3)
    made = statistics(str(tmp_path / "batch.npz"), tmp_path / "stats.npz")
    found = load_reference(tmp_path / "stats.npz")
    expected = moments(PixelFeatures()(torch.from_numpy(images).permute(0, 3, 1, 2)))
    assert (found.moments.count, found.part, found.fingerprint, found.shape) == (40, "all", None, (3, 4, 4))
    assert torch.allclose(found.moments.mean, expected.mean)
    assert torch.allclose(found.moments.covariance, expected.covariance)
    assert found.features is not None
    assert made.features is not None
    assert len(found.features) == 40
    found.require(PixelFeatures(), "of any data", (3, 4, 4))
    train = statistics(str(tmp_path / "batch.npz"), tmp_path / "train.npz", part="train", keep=5)
    assert 0 < train.moments.count < 40
    assert train.fingerprint
    np.save(tmp_path / "data.npy", images)
    assert statistics(DataConfig(source=str(tmp_path / "data.npy")), tmp_path / "x.npz").part == "train"


def test_a_batch_without_statistics_is_measured_when_it_is_read(images: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", images)
    made = statistics(str(tmp_path / "batch.npz"), tmp_path / "stats.npz")
    found = read_reference(tmp_path / "batch.npz", PixelFeatures(), CPU)
    assert torch.equal(found.moments.covariance, made.moments.covariance)
    assert found.features is not None
    assert (len(found.features), found.fingerprint, found.source) == (40, None, str(tmp_path / "batch.npz"))
    read = read_reference(tmp_path / "stats.npz", PixelFeatures(), CPU)
    assert dataclasses.replace(read, features=None, moments=found.moments).part == "all"


def test_the_statistics_of_a_batch_are_taken_where_it_has_them(images: npt.NDArray[np.uint8], tmp_path: Path) -> None:
    np.savez(tmp_path / "batch.npz", arr_0=images, mu=np.full(3, 0.5), sigma=np.eye(3))
    assert is_batch(tmp_path / "batch.npz")
    assert read_reference(tmp_path / "batch.npz", PixelFeatures(), CPU).moments.mean.tolist() == [0.5] * 3


def test_what_is_no_batch_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.npz").write_bytes(b"PK no zip")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name, words in (
        ("none.npz", "no such file"),
        ("broken.npz", "not an .npz file"),
        ("other.npz", "mu is missing"),
    ):
        assert not is_batch(tmp_path / name)
        with pytest.raises(UserError, match=words):
            read_reference(tmp_path / name, PixelFeatures(), CPU)
