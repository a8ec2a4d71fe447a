"""Small pipelines of diffusers' own classes, as its training scripts write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 32),
    "norm_num_groups": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
}


def unet(**changes: Any) -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{**SMALL, **changes}).eval()


def pipeline(folder: Path, model: Any, scheduler: Any) -> Path:
    diffusers.DDIMPipeline(model, scheduler).save_pretrained(folder)
    return folder


def with_part(folder: Path, name: str, part: Any) -> Path:
    """Give a pipeline another component, such as an autoencoder, or another scheduler."""
    part.save_pretrained(folder / name)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), name: ["diffusers", type(part).__name__]}))
    return folder


def trained(model: Any, steps: int) -> tuple[Any, Any]:
    """Train by diffusers' own classes, as its train_unconditional.py does, on images of one colour each."""
    noise, g = diffusers.DDPMScheduler(), torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        images = (torch.rand(8, 3, 1, 1, generator=g) * 2 - 1).expand(8, 3, 8, 8)
        eps, t = torch.randn(images.shape, generator=g), torch.randint(0, 1000, (8,), generator=g)
        loss = (model(noise.add_noise(images, eps, t), t).sample - eps).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval(), diffusers.DDIMScheduler.from_config(noise.config)
