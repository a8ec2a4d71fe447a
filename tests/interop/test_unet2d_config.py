"""config.json of a UNet2DModel: every setting is computed as diffusers computes it, or refused by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from foreign_unets import SMALL, diffusers, file_of, random_model, require_equal_outputs

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.unet2d_config import network_of_unet2d, size_of_unet2d, unet2d_settings

NARROW: dict[str, Any] = {"block_out_channels": [2, 2, 2], "norm_num_groups": 2, "add_attention": False}
NO_ATTENTION = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
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
    ({"down_block_types": ["SkipDownBlock2D"] * 3}, "'SkipDownBlock2D' is not read, only DownBlock2D and AttnDownBlock2D"),
    ({"down_block_types": ["DownBlock2D"]}, "must name a block for each of the 3 block_out_channels"),
    ({"attention_head_dim": 5}, "attention_head_dim=5 does not divide 16 channels that attend"),
    ({"rotary": True}, "rotary=True: this setting of UNet2DModel is unknown here"),
    ({"norm_num_groups": 3}, "norm_num_groups=3 does not divide 16 of block_out_channels=[16, 16, 32]"),
    ({"layers_per_block": 5000}, "layers_per_block=5000: 5000 is more than 1000, the most that is built"),
    ({"num_class_embeds": 10**9}, "num_class_embeds=1000000000: 1000000000 is more than"),
    ({"in_channels": 10**9, "out_channels": 10**9}, "in_channels=1000000000: 1000000000 is more than"),
    ({**NARROW, **NO_ATTENTION}, "block_out_channels=[2, 2, 2]: width 2 must be"),
    ({"sample_size": 0}, "sample_size=0 must be a positive number or two"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[str(change) for change, _ in REFUSED])
def test_what_no_network_has_is_refused_by_its_name(change: dict[str, Any], message: str) -> None:
    settings = {**file_of(diffusers.UNet2DModel(**SMALL)), **change}
    read = size_of_unet2d if "sample_size" in change else network_of_unet2d
    with pytest.raises(UserError) as error:
        read(settings)
    assert message in str(error.value)


NAN, INF = float("nan"), float("inf")
ODD: dict[str, list[Any]] = {
    "act_fn": ["silu", "swish", "SiLU", "mish", "gelu", None],
    "add_attention": [True, False, None, 0, 1],
    "attention_head_dim": [None, 1, 4, 16, 3, 12, 32, 0, -8, 8.0, True, "8", [8, 8, 8]],
    "attn_norm_num_groups": [None, 8, 4, 0, -1, 3, True],
    "block_out_channels": [[16, 16, 32], [32, 16, 16], [6, 6, 12], [15, 15, 30], [2, 2, 2], [16, 16], [], [8, 8, -8], None, 16],
    "center_input_sample": [False, True, None, 0, 1, "no"],
    "class_embed_type": [None, "timestep", "identity", "projection", "", 5],
    "down_block_types": [["DownBlock2D"] * 3, ["AttnSkipDownBlock2D"] * 3, ["ResnetDownsampleBlock2D"] * 3, None, [1, 2, 3], []],
    "downsample_padding": [0, 1, 2, None, -1, True, 1.0, "same"],
    "downsample_type": ["conv", "resnet", "avg", None],
    "dropout": [0.0, 0, 0.3, 1.0, -0.1, NAN, INF, "0.1", None, True],
    "flip_sin_to_cos": [True, False, None, 0, "true"],
    "freq_shift": [0, 1, 2, -1, 8, 0.5, 1.0, None, True],
    "in_channels": [3, 1, 0, -1, 3.0],
    "layers_per_block": [1, 2, 3, 0, -1, 2.0, True, None, [1, 2, 1]],
    "mid_block_scale_factor": [1, 1.0, 0.7071, 2, 0, None, "1"],
    "mid_block_type": ["UNetMidBlock2D", None, "UNetMidBlock2DCrossAttn", ""],
    "norm_eps": [1e-5, 1e-3, 1e-12, 0, -1, 1, 2, NAN, None, True, "1e-5"],
    "norm_num_groups": [1, 2, 4, 16, 3, 5, 32, 0, -1, None, 8.0, True],
    "num_class_embeds": [None, 1, 5, 0, -1, 5.0, True, "5"],
    "num_train_timesteps": [10, -1],  # of learnt embeddings only
    "out_channels": [3, 6, 1, -3],
    "resnet_time_scale_shift": ["default", "scale_shift", "ada_group", "spatial", None, 1],
    "sample_size": [8, [16, 8], 0, -4, [16], [16, 16, 16], [16, 0], 1.5, True, "16", 10**12],
    "time_embedding_dim": [None, 64, 0, 32, 128, 64.0, -1],
    "time_embedding_type": ["positional", "fourier", "learned", None, ""],
    "up_block_types": [["UpBlock2D"] * 3, ["SkipUpBlock2D"] * 3, ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"], None, []],
    "upsample_type": ["conv", "resnet", None],
}  # fmt: skip
TINY = {**SMALL, "sample_size": 8, "layers_per_block": 1}
SHIFTED = {"resnet_time_scale_shift": "scale_shift"}


def test_the_odd_values_are_of_all_settings() -> None:
    assert {name for name in file_of(diffusers.UNet2DModel(**SMALL)) if not name.startswith("_")} == ODD.keys()


@pytest.mark.parametrize("base", [{}, SHIFTED], ids=["default", "scale_shift"])
@pytest.mark.parametrize("name", ODD)
def test_a_setting_is_computed_as_by_diffusers_or_refused_by_its_name(name: str, base: dict[str, Any]) -> None:
    for value in ODD[name]:
        settings = {**TINY, **base, name: value}
        if value == ["DownBlock2D"] * 3:
            settings["up_block_types"] = ["UpBlock2D"] * 3
        if value == 1 and name == "in_channels":
            settings["out_channels"] = 1
        told = {**file_of(diffusers.UNet2DModel(**TINY)), **settings}
        told |= {key: list(found) for key, found in told.items() if isinstance(found, tuple)}
        try:
            network_of_unet2d(told)
            size_of_unet2d(told)
        except UserError as error:
            message = str(error)
            assert "network" not in message.replace("no network", ""), value
            assert message.count(f"{name}={value!r}") or name == "block_out_channels", message
            assert name in message
        else:
            require_equal_outputs(random_model(settings), rows=2)


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
