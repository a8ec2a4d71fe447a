"""UNet2DModels of diffusers with random weights, and the networks that are read from them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.interop.unet2d import unet2d_state
from multistage_diffusion.interop.unet2d_config import network_of_unet2d, size_of_unet2d
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.ldm import LDMConfig

diffusers = pytest.importorskip("diffusers")


def types(levels: int, *attending: int) -> dict[str, Any]:
    """The blocks of each side, with attention at some levels of the down side, 0 the finest."""
    attends = [level in attending for level in range(levels)]
    return {
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    }


SMALL = {"sample_size": 16, "block_out_channels": (16, 16, 32), "norm_num_groups": 8, **types(3, 1)}


def random_model(settings: dict[str, Any]) -> Any:
    """A UNet2DModel with random weights and biases, outputs of about 1."""
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**settings).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=1.2 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
    return model


def file_of(model: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(model.to_json_string())
    return found


def imported(model: Any) -> tuple[LDMConfig, dict[str, Tensor], torch.nn.Module]:
    config = network_of_unet2d(file_of(model))
    state = unet2d_state(model.state_dict(), config)
    network = build_network(config).eval()
    network.load_state_dict(state)
    return config, state, network


def require_equal_outputs(model: Any, rows: int) -> tuple[LDMConfig, dict[str, Tensor]]:
    """Compare the outputs of a UNet2DModel and of the network read from it, which is returned."""
    config, state, network = imported(model)
    size = size_of_unet2d(file_of(model))
    assert size is not None
    x = torch.randn(rows, config.channels, *size, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([3, 978, 411][:rows])
    labels = torch.tensor([1, 4, 0])[:rows] % config.num_classes if config.num_classes else None
    with torch.no_grad():
        theirs = model(x, steps, class_labels=labels).sample
        ours = network(x, steps.float(), [rows], Conditioning(labels=labels))
    assert 0.02 < theirs.std() < 20
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
    return config, state
