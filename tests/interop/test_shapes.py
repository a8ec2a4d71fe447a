"""A network's configuration from the shapes of its published tensors."""

import dataclasses
import re
from typing import Any

import pytest
import torch
from foreign_files import FAMILIES, Weights, golden, one_stage

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.interop.names import is_buffer, published_names, restore_published
from multistage_diffusion.interop.shapes import network_of, our_state, published_state, resolution_of
from multistage_diffusion.nets import build_network

SIZES = {"ncsnpp": (16, 16), "edm": (16, 16), "ldm": (8, 8)}


def learnt(name: str) -> Weights:
    return {key: value for key, value in golden(name)[1].items() if not is_buffer(key)}


def shapes_of(config: NetworkConfig, size: int = 32) -> Weights:
    with torch.device("meta"):
        network = build_network(config)
    return restore_published(network.state_dict(), published_names(config, (size, size)))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_golden_network_s_configuration_is_read_off_its_shapes(name: str) -> None:
    meta, weights = golden(name)[0], learnt(name)
    config = network_of(FAMILIES[name], weights, head_channels=16)  # type: ignore[arg-type]
    for key in ("channels", "encoder_width", "blocks_per_level"):
        assert getattr(config, key) == meta[key]
    for key in ("decoder_widths", "channel_mult"):
        assert list(getattr(config, key)) == meta[key]
    assert config.augment_dim == meta.get("augment_dim", 0)
    assert config.attention_factors == (2,)
    assert getattr(config, "decoder_attention", None) == ((True, False, False) if name == "ldm" else None)
    assert sum(value.numel() for value in our_state(weights, config, SIZES[name]).values()) == meta["params"]


@pytest.mark.parametrize(
    "name",
    [
        *("cifar10-dpm-five-stages", "cifar10-edm", "cifar10-edm-one-stage"),
        *("celebahq-ldm-table8-2", "celebahq-ldm-one-stage", "digits"),
    ],
)
def test_the_paper_s_networks_are_read_off_their_shapes(name: str) -> None:
    config = preset(name).network
    groups = getattr(config, "norm_groups", 16)  # not in the shapes
    read = network_of(config.family, shapes_of(config), norm_groups=groups)  # type: ignore[arg-type]
    # that a network's only decoder attends goes without saying
    untold = {"decoder_attention": None} if getattr(config, "decoder_attention", None) == (True,) else {}
    assert read == dataclasses.replace(config, dropout=read.dropout, **untold)


@pytest.mark.parametrize("family", ["ncsnpp", "ddpmpp", "ldm"])
@pytest.mark.parametrize("decoders", [1, 2])
def test_odd_networks_are_read_off_their_shapes(family: str, decoders: int) -> None:
    config = NetworkConfig.of(
        family=family,  # type: ignore[arg-type]
        channels=1,
        encoder_width=32,
        decoder_widths=(64, 32)[:decoders],
        channel_mult=(2,) if family == "ncsnpp" else (2, 1, 3),
        blocks_per_level=3,
        attention_factors=() if family == "ldm" else (1,),
        dropout=0.1,
        num_classes=5 if family == "ddpmpp" else 0,
        **({} if family == "ldm" else {"norm_groups": 32}),
    )
    assert network_of(family, shapes_of(config), norm_groups=32) == config  # type: ignore[arg-type]


def test_the_resolution_of_an_edm_network_is_in_its_names() -> None:
    assert resolution_of(learnt("edm")) == 16


@pytest.mark.parametrize("name", FAMILIES)
def test_weights_come_back_bit_for_bit(name: str) -> None:
    weights = learnt(name)
    config = network_of(FAMILIES[name], weights, head_channels=16)  # type: ignore[arg-type]
    back = published_state(our_state(weights, config, SIZES[name]), config, SIZES[name])
    assert set(back) == set(weights)
    assert all(torch.equal(back[key], weights[key]) for key in weights)


def test_half_precision_becomes_fp32() -> None:
    weights = {key: value.half() for key, value in learnt("ncsnpp").items()}
    state = our_state(weights, network_of("ncsnpp", weights), (16, 16))
    assert {value.dtype for value in state.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "key", "words"),
    [
        ("ncsnpp", "en_modules.0.weight", "has no en_modules.0.weight"),
        ("ncsnpp", "en_modules.3.Conv_0.weight", "has 4 encoder blocks for 3 levels|encoder blocks for 3 levels"),
        ("ncsnpp", "de_modules.2.1.Conv_0.bias", r"1 missing \(de_modules.2.1.Conv_0.bias\)"),
        ("edm", "model.map_layer0.weight", "has no model.map_layer0.weight"),
        ("edm", "model.decs.1.8x8_in0.qkv.weight", r"1 missing \(model.decs.1.8x8_in0.qkv.weight\)"),
        ("ldm", "input_blocks.0.0.weight", "has no input_blocks.0.0.weight"),
        ("ldm", "middle_block.1.norm.bias", r"1 missing \(middle_block.1.norm.bias\)"),
    ],
)
def test_a_missing_tensor_is_named(name: str, key: str, words: str) -> None:
    weights = learnt(name)
    del weights[key]
    with pytest.raises(ValueError, match=words):
        our_state(weights, network_of(FAMILIES[name], weights, head_channels=16), SIZES[name])  # type: ignore[arg-type]


def test_unexpected_and_misshapen_tensors_are_named_and_counted() -> None:
    weights = learnt("ldm")
    weights |= {"label.weight": torch.zeros(10, 128), "time_embed.0.bias": torch.zeros(4)}
    config = network_of("ldm", weights, head_channels=16)
    words = r"1 unexpected \(label.weight\), 1 of another shape \(time_embed.0.bias: \[4\], not \[128\]\)"
    with pytest.raises(ValueError, match=words):
        our_state(weights, config, (8, 8))


def test_widths_that_are_no_multiples_are_named() -> None:
    weights = learnt("edm")
    weights["model.enc.8x8_block0.conv0.weight"] = torch.zeros(30, 16, 3, 3)
    with pytest.raises(ValueError, match=r"model.enc.8x8_block0.conv0.weight has 30 channels, not a multiple of 16"):
        network_of("ddpmpp", weights)
    weights = learnt("ncsnpp")
    weights["en_modules.0.weight"] = torch.zeros(64)
    with pytest.raises(ValueError, match=r"en_modules.0.weight has shape \[64\], not 2 dimensions"):
        network_of("ncsnpp", weights)


def test_score_sde_s_ddpmpp_is_told_from_its_ncsnpp() -> None:
    weights = {key: value for key, value in one_stage("ncsnpp", learnt("ncsnpp")).items() if "Conv2d_0" not in key}
    with pytest.raises(ValueError, match="resamples without an input pyramid"):
        network_of("ncsnpp", weights)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"label_emb.weight": (10, 128)}, "is class-conditional (num_classes), see label_emb.weight"),
        ({"input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": (4, 4)}, "attends to a condition, such as text"),
        ({"input_blocks.1.0.emb_layers.1.weight": (64, 128)}, "scales and shifts by the noise (use_scale_shift_norm)"),
        ({"de_modules.1.2.2.in_layers.0.weight": (4,)}, "resamples in residual blocks (resblock_updown)"),
        ({"output_blocks.2.1.in_layers.0.weight": (4,)}, "resamples in residual blocks (resblock_updown)"),
        ({"id_predictor.1.weight": (4,)}, "predicts codebook entries (n_embed)"),
        ({"input_blocks.0.0.weight": (32, 7, 3, 3)}, "takes 7 channels and makes 3: it is told of other images"),
    ],
)
def test_other_networks_of_latent_diffusion_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    weights = learnt("ldm")
    assert weights["input_blocks.1.0.emb_layers.1.weight"].shape == (32, 128)
    with pytest.raises(ValueError, match=re.escape(words)):
        network_of("ldm", weights | {name: torch.zeros(shape) for name, shape in changes.items()}, head_channels=16)


@pytest.mark.parametrize("name", ["all_modules.4.Conv_0.weight", "all_modules.3.NIN_0.W"])
def test_score_sde_s_ddpm_and_image_pyramids_are_refused_by_name(name: str) -> None:
    weights = one_stage("ncsnpp", learnt("ncsnpp")) | {name: torch.zeros(8, 8, 1, 1)}
    if "NIN" not in name:  # a convolution outside a block
        weights = {key: value for key, value in weights.items() if not key.startswith("all_modules.4.GroupNorm_0")}
    with pytest.raises(ValueError, match="has blocks of score_sde's DDPM, or a pyramid that adds images"):
        network_of("ncsnpp", weights)


# released networks, of which docs/published.md says that they import; widths are those of their code's configurations
DEEP = {"channel_mult": (1, 2, 2, 2), "attention_factors": (2,)}
RELEASED = {
    "score_sde CIFAR-10": ("ncsnpp", 32, {**DEEP, "blocks_per_level": 4}),
    "score_sde CIFAR-10 deep": ("ncsnpp", 32, {**DEEP, "blocks_per_level": 8}),
    "EDM CIFAR-10": ("ddpmpp", 32, {"channel_mult": (2, 2, 2), "attention_factors": (2,), "augment_dim": 9}),
    "EDM CIFAR-10 conditional": (
        *("ddpmpp", 32),
        {"channel_mult": (2, 2, 2), "attention_factors": (2,), "augment_dim": 9, "num_classes": 10},
    ),
    "EDM FFHQ": ("ddpmpp", 64, {"channel_mult": (1, 2, 2, 2), "attention_factors": (4,), "augment_dim": 9}),
    "LDM FFHQ": (
        *("ldm", 64),
        {
            "encoder_width": 224,
            "decoder_widths": (224,),
            "channel_mult": (1, 2, 3, 4),
            "blocks_per_level": 2,
            "attention_factors": (2, 4, 8),
        },
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_networks_are_read_off_their_shapes(name: str) -> None:
    family, size, settings = RELEASED[name]
    groups = {} if family == "ldm" else {"norm_groups": 32}
    config = NetworkConfig.of(family, **{"dropout": 0.1, **settings, **groups})
    names = published_names(config, (size, size))
    with torch.device("meta"):
        weights = restore_published(build_network(config).state_dict(), names)
    read = network_of(family, weights, norm_groups=32)  # type: ignore[arg-type]
    assert read == dataclasses.replace(config, dropout=read.dropout)
    assert family != "ddpmpp" or resolution_of(weights) == size
