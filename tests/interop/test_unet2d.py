"""UNet2DModel: the imported network computes what diffusers computes, and its weights come back bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from foreign_unets import SMALL, file_of, imported, random_model, require_equal_outputs, types

from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.unet2d import unet2d_state, unet2d_tensors
from multistage_diffusion.interop.unet2d_config import network_of_unet2d, size_of_unet2d, unet2d_settings

DDPM: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


CIFAR10 = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), **types(4, 1), **DDPM}
TRAIN_UNCONDITIONAL = {"sample_size": 64, "block_out_channels": (128, 128, 256, 256, 512, 512), **types(6, 4)}
CELEBAHQ = {"sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512), **types(6, 4), **DDPM}
FULL = {"cifar10": CIFAR10, "train-unconditional": TRAIN_UNCONDITIONAL, "celebahq": CELEBAHQ}

NO_UP = ("UpBlock2D",) * 3
QUICK: dict[str, dict[str, Any]] = {
    "cifar10": {**CIFAR10, "block_out_channels": (16, 32, 32, 32), "norm_num_groups": 8},
    "train-unconditional": {
        **TRAIN_UNCONDITIONAL,
        "block_out_channels": (16, 16, 32, 32, 48, 48),
        "norm_num_groups": 8,
    },
    "celebahq": {**CELEBAHQ, "sample_size": 64, "block_out_channels": (16, 16, 32, 32, 64, 64), "norm_num_groups": 8},
    "default": {"block_out_channels": (16, 32, 48, 64), "norm_num_groups": 8, "sample_size": (16, 24)},
    "scale-shift, classes": {**SMALL, "resnet_time_scale_shift": "scale_shift", "num_class_embeds": 5},
    "scale-shift, normalised": {**SMALL, "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 8},
    "no attention": {**SMALL, "add_attention": False, "down_block_types": ("DownBlock2D",) * 3, "up_block_types": NO_UP},
    "attention down only": {**SMALL, "up_block_types": NO_UP},
    "grey, one level": {
        "in_channels": 1,
        "out_channels": 1,
        "sample_size": 8,
        "block_out_channels": (32,),
        "layers_per_block": 1,
        **types(1, 0),
        "dropout": 0.2,
    },
}  # fmt: skip


def require_equal(settings: dict[str, Any], rows: int) -> None:
    """Compare network, round trip of the weights, and round trip of the settings."""
    model = random_model(settings)
    config, state = require_equal_outputs(model, rows)
    back, original = unet2d_tensors(state, config), model.state_dict()
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    told = file_of(model)
    told.pop("_diffusers_version")
    size = size_of_unet2d(told)
    assert size is not None
    assert unet2d_settings(config, size) == told


@pytest.mark.parametrize("name", QUICK)
def test_outputs_weights_and_settings_are_those_of_diffusers(name: str) -> None:
    require_equal(QUICK[name], rows=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_real_configurations_are_those_of_diffusers(name: str) -> None:
    require_equal(FULL[name], rows=1)


def test_older_names_of_attention_and_its_1x1_convolutions_are_read() -> None:
    model = random_model(QUICK["cifar10"])
    config, state, _ = imported(model)
    old = {}
    renamed = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, value in model.state_dict().items():
        for new, before in renamed.items():
            if f".{new}." in name:
                name = name.replace(new, before)
                value = value[..., None, None] if value.ndim == 2 else value
        old[name] = value
    assert len(set(old) - set(model.state_dict())) == 8 * (2 + 3 + 1)
    again = unet2d_state(old, config)
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_faulty_weights_are_named() -> None:
    model = random_model(SMALL)
    config, weights = network_of_unet2d(file_of(model)), dict(model.state_dict())
    name = "up_blocks.1.attentions.0.to_k.weight"
    for changed, message in (
        ({**weights, "extra.weight": torch.zeros(1)}, "extra.weight: no weight of this network (1 unexpected)"),
        ({k: v for k, v in weights.items() if k != "conv_in.bias"}, "has no conv_in.bias"),
        ({k: v for k, v in weights.items() if k != name}, f"has no {name}"),
        ({**weights, name: torch.zeros(16, 8)}, f"{name} has shape [16, 8], not [16, 16]"),
        ({**weights, name: torch.zeros(16, 16, dtype=torch.bool)}, f"{name} is of torch.bool"),
        (
            {**weights, "conv_in.bias": torch.zeros(16).to(torch.float8_e4m3fn)},
            "conv_in.bias is of torch.float8_e4m3fn",
        ),
        ({**weights, name: torch.full((16, 16), 1e300, dtype=torch.float64)}, f"weights of {name} are not finite"),
        ({**weights, "conv_out.bias": torch.zeros(4)}, "conv_out.bias has shape [4], not [3]"),
        (
            {**weights, "conv_out.bias": torch.zeros(3, dtype=torch.int8)},
            "conv_out.bias is of torch.int8: only weights of float16, bfloat16, float32, float64 are read",
        ),
    ):
        with pytest.raises(UserError) as error:
            unet2d_state(changed, config)
        assert message in str(error.value)
    labelled = random_model({**SMALL, "num_class_embeds": 5})
    weights = {**labelled.state_dict(), "class_embedding.weight": torch.zeros(6, 64)}
    with pytest.raises(UserError, match=r"class_embedding.weight has shape \[6, 64\], not \[5, 64\]"):
        unet2d_state(weights, network_of_unet2d(file_of(labelled)))


def test_a_network_of_thousands_of_blocks_is_not_built_for_a_file_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("multistage_diffusion.interop.unet2d.meta_network", None)
    model = random_model(SMALL)
    config = network_of_unet2d({**file_of(model), "layers_per_block": 1000})
    with pytest.raises(UserError, match=r"has no down_blocks\.0\.resnets\.2\.conv1\.weight"):
        unet2d_state(model.state_dict(), config)
