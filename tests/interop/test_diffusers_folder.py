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


def part(folder: Path, value: float, *, old: bool = False, config: dict[str, Any] | None = None) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"value": value} if config is None else config))
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
    same = {"value": 7, "_diffusers_version": "1"}
    part(tmp_path / "checkpoint-5" / "unet", 1.0, config=same)
    part(tmp_path / "checkpoint-5" / "unet_ema", 0.5, config=same | {"decay": 0.999, "_diffusers_version": "2"})
    scheduler(tmp_path / "scheduler")
    assert values(tmp_path / "checkpoint-5") == (7, 1.0, 0.5)
    assert values(tmp_path / "checkpoint-5" / "unet_ema") == (7, 0.5, 0.5)


def test_an_average_of_another_network_is_refused(tmp_path: Path) -> None:
    part(tmp_path / "unet", 1.0, config={"norm_num_groups": 4})
    part(tmp_path / "unet_ema", 0.5, config={"norm_num_groups": 2})
    scheduler(tmp_path)
    with pytest.raises(UserError, match=r"unet_ema/config\.json: norm_num_groups=2 is not the model's 4"):
        read_folder(tmp_path)


def test_divided_weights_are_read_rather_than_an_older_file_beside_them(tmp_path: Path) -> None:
    part(tmp_path / "unet", 1.0)
    names = {"w": "diffusion_pytorch_model-1-of-2.safetensors", "v": "diffusion_pytorch_model-2-of-2.safetensors"}
    for number, (name, file) in enumerate(names.items()):
        save_file({name: torch.full((2,), 5.0 + number)}, tmp_path / "unet" / file)
    index = tmp_path / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    found = read_weights(tmp_path / "unet")
    assert {name: value.tolist() for name, value in found.items()} == {"w": [5.0, 5.0], "v": [6.0, 6.0]}
    outside = tmp_path / "w.safetensors"
    save_file({"w": torch.zeros(2)}, outside)
    for given, message in (
        ({"weight_map": {"w": "../w.safetensors"}}, "which is not beside it"),
        ({"weight_map": {"w": "missing.safetensors"}}, "names 'missing.safetensors', which is not beside it"),
        ({"weight_map": [1]}, "has no weight_map"),
        ({}, "has no weight_map"),
    ):
        index.write_text(json.dumps(given))
        with pytest.raises(UserError, match=message):
            read_weights(tmp_path / "unet")


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
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").touch()
    with pytest.raises(UserError, match=r"holds none of .*; rename the variant .*fp16\.safetensors"):
        read_weights(tmp_path / "unet")
    torch.save([1, 2], tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="is a list, not a dictionary"):
        read_weights(tmp_path / "unet")
    for odd in (torch.eye(3).to_sparse(), torch.empty(2, device="meta"), torch.zeros(1).expand(10**6, 10**6)):
        torch.save({"conv_in.weight": odd}, tmp_path / "unet" / "diffusion_pytorch_model.bin")
        with pytest.raises(UserError, match=r"'conv_in\.weight' does not hold all of its \d+ numbers"):
            read_weights(tmp_path / "unet")


def test_a_flipped_bit_of_old_weights_is_found(tmp_path: Path) -> None:
    part(tmp_path / "unet", 1.0, old=True)
    file = tmp_path / "unet" / "diffusion_pytorch_model.bin"
    content = bytearray(file.read_bytes())
    content[content.index(torch.full((2,), 1.0).numpy().tobytes()) + 1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"diffusion_pytorch_model\.bin: is truncated or damaged \(entry .*Bad CRC-32"):
        read_weights(tmp_path / "unet")
