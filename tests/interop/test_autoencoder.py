"""The VQ first stage of a latent diffusion file, as a diffusers VQModel."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from foreign_files import Weights, compvis_weights

from multistage_diffusion.interop.autoencoder import diffusers_name, downsampling, first_stage

diffusers = pytest.importorskip("diffusers")


def model(attention: bool = True, code_width: int | None = 5) -> Any:
    torch.manual_seed(0)
    kinds = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D")
    return diffusers.VQModel(
        in_channels=3,
        out_channels=3,
        down_block_types=kinds,
        up_block_types=("AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=2,
        latent_channels=3,
        num_vq_embeddings=16,
        vq_embed_dim=code_width,
        norm_num_groups=32,
    ).eval()


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("code_width", [None, 5])
def test_a_first_stage_encodes_and_decodes_as_before(attention: bool, code_width: int | None) -> None:
    original = model(attention, code_width)
    read = first_stage(compvis_weights(original) | {"loss.discriminator.main.0.weight": torch.zeros(1)})
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = original.encode(images).latents
        assert latents.shape == (2, code_width or 3, 8, 12)
        assert torch.equal(read.encode(images).latents, latents)
        assert torch.equal(read.decode(latents).sample, original.decode(latents).sample)
    assert read.config.scaling_factor == 1.0


def test_names_of_the_autoencoder_of_latent_diffusion() -> None:
    # names as CompVis' taming transformers print them, level by level
    assert diffusers_name("encoder.down.0.block.1.norm1.weight", 3) == "encoder.down_blocks.0.resnets.1.norm1.weight"
    assert diffusers_name("encoder.down.1.downsample.conv.bias", 3) == "encoder.down_blocks.1.downsamplers.0.conv.bias"
    assert diffusers_name("decoder.up.0.block.2.conv2.bias", 3) == "decoder.up_blocks.2.resnets.2.conv2.bias"
    assert diffusers_name("decoder.up.2.upsample.conv.weight", 3) == "decoder.up_blocks.0.upsamplers.0.conv.weight"
    assert diffusers_name("decoder.mid.block_2.conv1.weight", 3) == "decoder.mid_block.resnets.1.conv1.weight"
    assert diffusers_name("decoder.mid.attn_1.norm.bias", 3) == "decoder.mid_block.attentions.0.group_norm.bias"
    assert diffusers_name("encoder.mid.attn_1.proj_out.bias", 3) == "encoder.mid_block.attentions.0.to_out.0.bias"
    assert diffusers_name("encoder.norm_out.weight", 3) == "encoder.conv_norm_out.weight"
    assert diffusers_name("post_quant_conv.weight", 3) == "post_quant_conv.weight"
    shortcut = "encoder.down_blocks.1.resnets.0.conv_shortcut.weight"
    assert diffusers_name("encoder.down.1.block.0.nin_shortcut.weight", 3) == shortcut


@pytest.mark.parametrize("attention", [False, True])
def test_a_kl_first_stage_encodes_and_decodes_as_before(attention: bool) -> None:
    torch.manual_seed(0)
    kinds = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D")
    original = diffusers.AutoencoderKL(
        down_block_types=kinds,
        up_block_types=("AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D", "UpDecoderBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=32,
    ).eval()
    weights = compvis_weights(original)
    assert weights["encoder.conv_out.weight"].shape[0] == weights["quant_conv.weight"].shape[0] == 8  # mean, variance
    read = first_stage(weights | {"loss.logvar": torch.zeros(())}, scale=0.25)
    assert type(read) is diffusers.AutoencoderKL
    images = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        latents = original.encode(images).latent_dist.mean
        assert torch.equal(read.encode(images).latent_dist.mean, latents)
        assert torch.equal(read.decode(latents).sample, original.decode(latents).sample)
    assert read.config.scaling_factor == 0.25
    assert (downsampling(weights), downsampling({})) == (2, None)


def without(weights: Weights, key: str) -> Weights:
    return {name: value for name, value in weights.items() if name != key}


def test_what_is_no_autoencoder_is_named() -> None:
    weights = compvis_weights(model())
    for changed, words in (
        (
            without(weights, "quantize.embedding.weight"),
            "no whole VQ or KL autoencoder (its encoder makes 3 channels, not mean and variance of 5)",
        ),
        (without(weights, "encoder.conv_out.weight"), "no whole VQ or KL autoencoder ('encoder.conv_out.weight')"),
        (without(weights, "encoder.conv_out.bias"), "encoder.conv_out.bias does not fit a VQModel, one of 1"),
        (weights | {"more.weight": torch.zeros(1)}, "more.weight does not fit a VQModel, one of 1"),
        (weights | {"quant_conv.bias": torch.zeros(9)}, "quant_conv.bias does not fit a VQModel, one of 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            first_stage(changed)
