"""Latents are encoded once, kept, read back as they were, and scaled."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from multistage_diffusion.contracts import Codec
from multistage_diffusion.data import ImageData, to_float
from multistage_diffusion.data.rows import ArrayRows, FileRows, Rows, ScaledRows
from multistage_diffusion.latent.codecs import IdentityCodec
from multistage_diffusion.latent.latents import LatentData, cached_latents, default_cache, encode_images


class Corners:
    """Takes the upper left of every 2x2 pixels, times 3 plus 1, and counts what it encodes."""

    def __init__(self, fingerprint: str = "corners") -> None:
        self.fingerprint = fingerprint
        self.sizes: list[int] = []

    def encode(self, images: Tensor) -> Tensor:
        self.sizes.append(len(images))
        return 3 * images[:, :, ::2, ::2] + 1

    def decode(self, latents: Tensor) -> Tensor:
        return ((latents - 1) / 3).repeat_interleave(2, 2).repeat_interleave(2, 3)

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        return shape[0], shape[1] // 2, shape[2] // 2


def images(count: int = 7, seed: int = 0) -> ImageData:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 6), dtype=np.uint8)
    return ImageData(pixels, np.arange(count) % 3, "noise", ("a", "b", "c", "unseen"))


def everything(rows: Rows) -> np.ndarray:
    return rows.rows(np.arange(len(rows)))


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def cached(codec: Codec, data: ImageData, folder: Path, *, scale: float | None = 1.0, mirrored: bool = False):
    return cached_latents(codec, data, scale=scale, mirrored=mirrored, folder=folder)


# -- encoding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [None, 1, 3, 100])
def test_images_are_encoded_alike_in_any_batch(batch: int | None) -> None:
    pixels = images().tensor()
    told: list[tuple[int, int]] = []
    latents = encode_images(Corners(), pixels, batch=batch, progress=lambda *news: told.append(news))
    assert torch.equal(latents, 3 * to_float(pixels)[:, :, ::2, ::2] + 1)
    assert latents.dtype == torch.float32
    assert told[-1] == (7, 7)
    assert len(told) == {None: 1, 1: 7, 3: 3, 100: 1}[batch]


def test_mirrored_means_the_latents_of_mirrored_images() -> None:
    pixels = images().tensor()
    latents = encode_images(Corners(), pixels, mirrored=True)
    assert torch.equal(latents, encode_images(Corners(), pixels.flip(-1)))
    assert not torch.equal(latents, encode_images(Corners(), pixels).flip(-1))


def test_large_images_are_encoded_a_few_at_a_time() -> None:
    codec = Corners()
    encode_images(codec, torch.zeros(10, 1, 256, 256, dtype=torch.uint8))
    assert codec.sizes == [4, 4, 2]


def test_latents_that_are_not_finite_are_refused() -> None:
    codec = Corners()
    codec.encode = lambda x: torch.full((len(x), 1, 2, 3), torch.nan)  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="latents of images 0 to 1 are not finite"):
        encode_images(codec, images(2).tensor())


# -- the cache --------------------------------------------------------------------------------------------------------


def test_a_second_call_reads_what_the_first_kept(tmp_path: Path) -> None:
    codec, data = Corners(), images()
    first, _ = cached(codec, data, tmp_path, mirrored=True)
    assert codec.sizes == [7, 7]
    assert [path.suffix for path in kept(tmp_path)] == [".safetensors"] * 2
    again, _ = cached(codec, data, tmp_path, mirrored=True)
    assert codec.sizes == [7, 7]
    assert torch.equal(again.tensor(), first.tensor())
    assert first.mirrored is not None
    assert again.mirrored is not None
    assert np.array_equal(everything(again.mirrored), everything(first.mirrored))
    assert torch.equal(first.tensor(), encode_images(Corners(), data.tensor()))
    mirrored = encode_images(Corners(), data.tensor(), mirrored=True)
    assert np.array_equal(everything(first.mirrored), mirrored.numpy())


def test_only_what_is_missing_is_encoded(tmp_path: Path) -> None:
    codec, told = Corners(), []
    plain, _ = cached(codec, images(), tmp_path)
    assert plain.mirrored is None
    cached_latents(
        codec, images(), scale=1.0, mirrored=True, folder=tmp_path, batch=4, progress=lambda *news: told.append(news)
    )
    assert codec.sizes == [7, 4, 3]
    assert told == [(4, 7), (7, 7)]
    cached(codec, images(seed=1), tmp_path)
    other = Corners("another")
    cached(other, images(), tmp_path)
    assert (codec.sizes, other.sizes) == ([7, 4, 3, 7], [7])
    assert len(kept(tmp_path)) == 4


def test_progress_counts_both_sides_together(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    cached_latents(
        Corners(), images(), scale=1.0, mirrored=True, folder=tmp_path, batch=4, progress=lambda *n: told.append(n)
    )
    assert told == [(4, 14), (7, 14), (11, 14), (14, 14)]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def shorten(path: Path) -> None:
    latents = load_file(path)["latents"][:2].contiguous()
    save_file({"latents": latents}, path, metadata={"sha256": hashlib.sha256(latents.numpy().data).hexdigest()})


def rename(path: Path) -> None:
    save_file({"other": load_file(path)["latents"]}, path)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, empty, shorten, rename])
def test_a_damaged_file_is_made_again_with_a_warning(damage, tmp_path: Path) -> None:
    codec = Corners()
    first, _ = cached(codec, images(), tmp_path)
    (path,) = kept(tmp_path)
    damage(path)
    with pytest.warns(UserWarning, match=rf"{path}: damaged \(.*\); its latents are made again"):
        again, _ = cached(codec, images(), tmp_path)
    assert codec.sizes == [7, 7]
    assert torch.equal(again.tensor(), first.tensor())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached(codec, images(), tmp_path)
    assert codec.sizes == [7, 7]


@pytest.mark.parametrize("scale", [None, 0.5])
def test_latents_beyond_memory_are_read_from_the_file(
    scale: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = images(3000)
    held, known = cached(Corners(), data, tmp_path, scale=scale, mirrored=True)
    monkeypatch.setattr("multistage_diffusion.data.rows.IN_MEMORY", 2 * 3000 * 6 * 4 - 1)
    drawn, again = cached(Corners(), data, tmp_path, scale=scale, mirrored=True)
    assert isinstance(held.storage, ArrayRows)
    assert isinstance(drawn.storage, ScaledRows)
    assert isinstance(drawn.storage.source, FileRows)
    assert again == known
    some = np.array([7, 3, 3, 2999, 0])
    assert np.array_equal(drawn.rows(some), held.rows(some))
    assert np.array_equal(drawn.subset([5, 2]).tensor(), held.tensor()[[5, 2]])
    assert drawn.mirrored is not None
    assert held.mirrored is not None
    assert np.array_equal(everything(drawn.mirrored), everything(held.mirrored))


def test_a_cache_that_cannot_be_written_costs_only_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="latents cannot be kept .* set MSDIFF_CACHE"):
        latents, _ = cached(Corners(), images(), tmp_path / "file" / "cache")
    assert len(latents) == 7


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path))
    cached_latents(Corners(), images(), scale=1.0)
    assert len(kept(tmp_path / "latents")) == 1
    monkeypatch.delenv("MSDIFF_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "home" / ".cache" / "multistage-diffusion" / "latents"


# -- scale and what stays with the latents ----------------------------------------------------------------------------


@pytest.mark.parametrize("mirrored", [False, True])
def test_the_scale_makes_the_standard_deviation_one(mirrored: bool, tmp_path: Path) -> None:
    data = images(2000)
    x = data.array().astype(np.float64) / 127.5 - 1
    sides = [x, x[..., ::-1]] if mirrored else [x]
    raw = np.concatenate([3 * side[:, :, ::2, ::2] + 1 for side in sides])
    latents, scale = cached(Corners(), data, tmp_path, scale=None, mirrored=mirrored)
    assert scale == pytest.approx(1 / raw.std(), rel=1e-7)
    torch.testing.assert_close(latents.tensor(), torch.from_numpy(raw[:2000] / raw.std()).float())
    assert (latents.mirrored is not None) == mirrored
    if latents.mirrored is not None:
        found = torch.from_numpy(everything(latents.mirrored))
        torch.testing.assert_close(found, torch.from_numpy(raw[2000:] / raw.std()).float())


def test_a_given_scale_is_used_and_the_cache_does_not_know_it(tmp_path: Path) -> None:
    codec, data = IdentityCodec(), images()
    twice, scale = cached(codec, data, tmp_path, scale=2.0)
    plain, _ = cached(codec, data, tmp_path)
    assert scale == 2.0
    assert torch.equal(twice.tensor(), 2 * to_float(data.array()))
    assert torch.equal(plain.tensor(), to_float(data.array()))


def test_equal_latents_give_no_scale(tmp_path: Path) -> None:
    black = ImageData(np.zeros((3, 1, 4, 6), np.uint8), None, "black")
    with pytest.raises(ValueError, match="black: all latents are equal, which gives no scale"):
        cached(Corners(), black, tmp_path, scale=None)


def test_labels_and_names_stay_with_the_latents(tmp_path: Path) -> None:
    latents, _ = cached(Corners(), images(), tmp_path)
    assert latents.labels is not None
    assert latents.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert (latents.name, latents.num_classes, latents.class_names[3]) == ("noise", 4, "unseen")
    assert (len(latents), latents.shape) == (7, (1, 2, 3))
    assert latents.tensor().data_ptr() == latents.tensor().data_ptr()
    assert LatentData(torch.zeros(2, 1, 1, 1), None, None, "none").num_classes == 0
