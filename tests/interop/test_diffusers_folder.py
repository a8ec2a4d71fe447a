"""Folders of diffusers: which files are read, and what is said of missing ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.diffusers_folder import read_folder, read_weights


def part(folder: Path, value: float, *, old: bool = False) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"value": value}))
    tensors = {"w": torch.full((2,), value)}
    if old:
        torch.save(tensors, folder / "diffusion_pytorch_model.bin")
    else:
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


def scheduler(folder: Path, name: str = "DDPMScheduler") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": name}))


def values(folder: Path) -> tuple[Any, float, float]:
    found = read_folder(folder)
    return found.network["value"], found.model["w"][0].item(), found.ema["w"][0].item()


def test_a_pipeline(tmp_path: Path) -> None:
    part(tmp_path / "unet", 1.0)
    scheduler(tmp_path / "scheduler")
    assert values(tmp_path) == (1.0, 1.0, 1.0)
    assert read_folder(tmp_path).codec is None
    part(tmp_path / "vqvae", 2.0)
    assert read_folder(tmp_path).codec == tmp_path / "vqvae"


def test_a_checkpoint_of_a_training_script_has_an_average_and_the_scheduler_of_its_parent(tmp_path: Path) -> None:
    part(tmp_path / "checkpoint-5" / "unet", 1.0)
    part(tmp_path / "checkpoint-5" / "unet_ema", 0.5)
    scheduler(tmp_path / "scheduler")
    assert values(tmp_path / "checkpoint-5") == (1.0, 1.0, 0.5)
    assert values(tmp_path / "checkpoint-5" / "unet_ema") == (0.5, 0.5, 0.5)


def test_an_old_folder_has_everything_in_one_place_and_weights_of_torch(tmp_path: Path) -> None:
    part(tmp_path / "model", 3.0, old=True)
    scheduler(tmp_path / "model")
    assert values(tmp_path / "model") == (3.0, 3.0, 3.0)


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config.json of a U-Net"):
        read_folder(tmp_path)
    part(tmp_path / "unet", 1.0)
    with pytest.raises(UserError, match=r"scheduler_config.json: is missing"):
        read_folder(tmp_path)
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(UserError, match="is truncated or damaged"):
        read_weights(tmp_path / "unet")
    file.unlink()
    with pytest.raises(UserError, match="holds neither"):
        read_weights(tmp_path / "unet")
    torch.save([1, 2], tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is no state dict"):
        read_weights(tmp_path / "unet")
