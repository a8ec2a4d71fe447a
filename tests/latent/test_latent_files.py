"""Files of latents: what is written part by part is what is read, and what a full disk costs."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from multistage_diffusion.latent.latent_files import read_latents, write_latents

SHAPE = (20, 2, 3, 5)
LATENTS = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


def parts() -> Iterator[Tensor]:
    yield from torch.split(LATENTS, 7)


def test_a_file_holds_what_its_parts_are(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    rows = write_latents(path, SHAPE, parts)
    again = read_latents(path, SHAPE)
    assert again is not None
    some = np.array([3, 19, 0, 3])
    for found in (rows, again):
        assert (len(found), found.shape) == (20, SHAPE[1:])
        assert np.array_equal(found.rows(some), LATENTS.numpy()[some])
        assert found.rows(some).dtype == np.float32
    assert torch.equal(load_file(path)["latents"], LATENTS)
    with safe_open(path, framework="np") as file:
        assert file.metadata() == {"sha256": hashlib.sha256(LATENTS.numpy().tobytes()).hexdigest()}


def test_a_file_of_another_shape_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    write_latents(path, SHAPE, parts)
    with pytest.warns(UserWarning, match="its content is not what was written"):
        assert read_latents(path, (20, 3, 2, 5)) is None
    assert read_latents(tmp_path / "missing.safetensors", SHAPE) is None


def test_a_full_disk_is_told_before_anything_is_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    encoded: list[int] = []

    def counted() -> Iterator[Tensor]:
        for part in parts():
            encoded.append(len(part))
            yield part

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.warns(UserWarning, match="latents cannot be kept .No space left on device"):
        rows = write_latents(tmp_path / "made.safetensors", SHAPE, counted)
    assert encoded == [7, 7, 6]
    assert np.array_equal(rows.rows(np.arange(20)), LATENTS.numpy())
    assert list(tmp_path.iterdir()) == []
