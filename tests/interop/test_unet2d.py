"""UNet2DModel: the imported network computes what diffusers computes, and its weights come back bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.unet2d import (
    network_of_unet2d,
    size_of_unet2d,
    unet2d_settings,
    unet2d_state,
    unet2d_tensors,
)
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.ldm import LDMConfig

diffusers = pytest.importorskip("diffusers")

# What DDPM's own models have on the hub: one head, padding below and on the right, sines first, frequencies to the last.
DDPM: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}


def types(levels: int, *attending: int) -> dict[str, Any]:
    """The blocks of each side, with attention at some levels of the down side, 0 the finest."""
    attends = [level in attending for level in range(levels)]
    return {
        "down_block_types": tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
    }


CIFAR10 = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), **types(4, 1), **DDPM}
TRAIN_UNCONDITIONAL = {"sample_size": 64, "block_out_channels": (128, 128, 256, 256, 512, 512), **types(6, 4)}
CELEBAHQ = {"sample_size": 256, "block_out_channels": (128, 128, 256, 256, 512, 512), **types(6, 4), **DDPM}
FULL = {"cifar10": CIFAR10, "train-unconditional": TRAIN_UNCONDITIONAL, "celebahq": CELEBAHQ}

SMALL = {"sample_size": 16, "block_out_channels": (16, 16, 32), "norm_num_groups": 8, **types(3, 1)}
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


def require_equal(settings: dict[str, Any], rows: int) -> None:
    """Compare network, round trip of the weights, and round trip of the settings."""
    model = random_model(settings)
    config, state, network = imported(model)
    size = size_of_unet2d(file_of(model))
    assert size is not None
    x = torch.randn(rows, config.channels, *size, generator=torch.Generator().manual_seed(1))
    steps = torch.tensor([3, 978, 411][:rows])
    labels = torch.tensor([1, 4, 0])[:rows] if config.num_classes else None
    with torch.no_grad():
        theirs = model(x, steps, class_labels=labels).sample
        ours = network(x, steps.float(), [rows], Conditioning(labels=labels))
    assert 0.02 < theirs.std() < 20
    assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, float(theirs.abs().max()))
    back, original = unet2d_tensors(state, config), model.state_dict()
    assert back.keys() == original.keys()
    assert all(torch.equal(back[name], original[name]) for name in original)
    told = file_of(model)
    told.pop("_diffusers_version")
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


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"flip_sin_to_cos": "no"}, "flip_sin_to_cos='no' must be true or false"),
    ({"add_attention": []}, "add_attention=[] must be true or false"),
    ({"_class_name": "UNet2DConditionModel"}, "_class_name='UNet2DConditionModel': only UNet2DModel is read"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier': only 'positional' is read"),
    ({"center_input_sample": True}, "center_input_sample=True"),
    ({"mid_block_type": None}, "mid_block_type=None"),
    ({"mid_block_scale_factor": 1.5}, "mid_block_scale_factor=1.5"),
    ({"downsample_type": "resnet"}, "downsample_type='resnet'"),
    ({"upsample_type": "resnet"}, "upsample_type='resnet'"),
    ({"act_fn": "mish"}, "act_fn='mish': only 'silu' or 'swish' is read"),
    ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
    ({"time_embedding_dim": 100}, "time_embedding_dim=100"),
    ({"attn_norm_num_groups": 2}, "attn_norm_num_groups=2"),
    ({"downsample_padding": 2}, "downsample_padding=2"),
    ({"freq_shift": 2}, "freq_shift=2"),
    ({"resnet_time_scale_shift": "spatial"}, "resnet_time_scale_shift='spatial'"),
    ({"out_channels": 6}, "out_channels=6 for in_channels=3"),
    ({"block_out_channels": [16, 24, 32]}, "block_out_channels=[16, 24, 32]: only multiples of the first"),
    ({"block_out_channels": "wide"}, "block_out_channels='wide' must be a list"),
    ({"layers_per_block": 2.5}, "layers_per_block=2.5 must be a whole number"),
    ({"norm_eps": "small"}, "norm_eps='small' must be a number"),
    ({"up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]}, "their attention is at other levels"),
    ({"down_block_types": ["SkipDownBlock2D"] * 3}, "down_block_types: 'SkipDownBlock2D' is not read"),
    ({"down_block_types": ["DownBlock2D"]}, "must name a block for each of 3 levels"),
    ({"attention_head_dim": 5}, "network.head_channels=5 does not divide"),
    ({"rotary": True}, "rotary=True: this setting of UNet2DModel is unknown here"),
    ({"sample_size": 0}, "sample_size=0 must be a positive number or two"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_what_no_network_has_is_refused_by_its_name(change: dict[str, Any], message: str) -> None:
    settings = {**file_of(diffusers.UNet2DModel(**SMALL)), **change}
    read = size_of_unet2d if "sample_size" in change else network_of_unet2d
    with pytest.raises(UserError) as error:
        read(settings)
    assert message in str(error.value)


def test_averaging_settings_in_a_configuration_are_passed_over() -> None:
    settings = file_of(diffusers.UNet2DModel(**SMALL))
    assert network_of_unet2d({**settings, "decay": 0.99, "optimization_step": 12}) == network_of_unet2d(settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"decoder_widths": (16, 16)}, "decoders=2: a UNet2DModel has 1"),
        ({"decoder_widths": (32,)}, "network.decoder_widths=32: a UNet2DModel has 16"),
        ({"augment_dim": 9}, "network.augment_dim=9"),
        ({"num_classes": 3, "label_embedding": "input"}, "network.label_embedding='input'"),
        ({"middle_attention": "plain"}, "network.middle_attention='plain'"),
    ],
)
def test_networks_that_no_unet2dmodel_is_are_refused(change: dict[str, Any], message: str) -> None:
    config = replace(network_of_unet2d(file_of(diffusers.UNet2DModel(**SMALL))), **change)
    with pytest.raises(UserError) as error:
        unet2d_settings(config, (16, 16))
    assert message in str(error.value)
    with pytest.raises(UserError, match="only 'ldm' networks"):
        unet2d_settings(NetworkConfig.of("ddpmpp"), (16, 16))


def test_faulty_weights_are_named() -> None:
    model = random_model(SMALL)
    config, weights = network_of_unet2d(file_of(model)), dict(model.state_dict())
    name = "up_blocks.1.attentions.0.to_k.weight"
    for changed, message in (
        ({**weights, "extra.weight": torch.zeros(1)}, "extra.weight: no weight of this network (1 unexpected)"),
        ({k: v for k, v in weights.items() if k != "conv_in.bias"}, "has no conv_in.bias"),
        ({k: v for k, v in weights.items() if k != name}, "qkv.weight"),
        ({**weights, "conv_out.bias": torch.zeros(4)}, "conv_out.bias has shape [4], not [3]"),
        (
            {**weights, "conv_out.bias": torch.zeros(3, dtype=torch.int8)},
            "conv_out.bias is of torch.int8: quantised weights are not read",
        ),
    ):
        with pytest.raises(UserError) as error:
            unet2d_state(changed, config)
        assert message in str(error.value)
