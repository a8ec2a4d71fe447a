"""What sets the LDM U-Net apart; test_network.py holds what all families share, test_golden_networks.py the published outputs."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.nets import MultiDecoderNetwork, build_network
from multistage_diffusion.nets.ldm import (
    AsymmetricDown,
    HeadedAttention,
    LDMBlock,
    LDMDecoder,
    LDMEncoder,
    ordered_sinusoids,
)

SMALL = NetworkConfig.of(
    family="ldm",
    channels=4,
    encoder_width=32,
    decoder_widths=(64, 32),
    channel_mult=(1, 2),
    blocks_per_level=2,
    attention_factors=(1,),
    head_channels=16,
    dropout=0.0,
)


def awake(module: torch.nn.Module) -> torch.nn.Module:
    """In float64 and with ordinary random weights: the last layers of blocks and attentions start at zero."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def attending(config: NetworkConfig) -> list[str]:
    names = [name for name, module in build_network(config).named_modules() if isinstance(module, HeadedAttention)]
    return [name.removesuffix(".attention") for name in names]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"head_channels": 0}, "network.head_channels=0 must be positive"),
    ({"head_channels": 48}, "network.head_channels=48 does not divide 256 channels"),
    (
        {"head_channels": 64, "decoder_widths": (96,), "channel_mult": (1, 2, 3), "attention_factors": (4,)},
        "network.head_channels=64 does not divide 288 channels that attend; use 32",
    ),
    ({"group_count": 0}, "network.group_count=0 must be positive"),
    ({"norm_eps": 1.0}, "network.norm_eps=1.0 must be in (0, 1)"),
    ({"embedding_shift": 2}, "network.embedding_shift=2 must be 0 or 1"),
    ({"decoder_attention": (True, False)}, "decoder_attention=[True, False] needs one value for each of the 1 stages"),
    ({"decoder_attention": ()}, "network.decoder_attention=[] needs one value for each"),
    ({"decoder_widths": (48,)}, "is not divisible into 32 groups"),
    ({"encoder_width": 48}, "48 x 1 = 48 channels is not divisible into 32 groups"),
    ({"decoder_widths": (80,)}, "GroupNorm; use a multiple of 32"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[str(b) for b, _ in REFUSED])
def test_refused_values_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        NetworkConfig.of("ldm", **bad)
    assert message in str(error.value)


def test_a_level_of_one_channel_per_group_is_warned_of() -> None:
    (text,) = replace(SMALL, channel_mult=(1, 2)).advice()
    assert text.startswith("network.family=ldm with 32 channels at a level")
    assert replace(SMALL, decoder_widths=(64, 64)).advice() == []


def test_embedding_by_hand() -> None:
    result = ordered_sinusoids(torch.tensor([0.0, 999.0], dtype=torch.float64), 8)
    for row, step in enumerate([0.0, 999.0]):
        angles = [step * 10000 ** (-i / 4) for i in range(4)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        assert result[row].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("head_channels", [64, 32, 16])
def test_attention_equals_explicit_softmax_head_by_head(head_channels: int) -> None:
    layer = HeadedAttention(64, head_channels)
    awake(layer)
    x = torch.randn(2, 64, 3, 5, dtype=torch.float64)
    tokens = F.group_norm(x, 32, layer.norm.weight, layer.norm.bias, 1e-5).permute(0, 2, 3, 1).reshape(2, 15, 64)
    heads = []
    for rows in layer.qkv(tokens).split(3 * head_channels, dim=-1):  # each head's q, k and v lie together
        q, k, v = rows.split(head_channels, dim=-1)
        weights = torch.softmax(torch.einsum("bic,bjc->bij", q, k) / math.sqrt(head_channels), dim=-1)
        heads.append(torch.einsum("bij,bjc->bic", weights, v))
    h = layer.proj(torch.cat(heads, dim=-1)).reshape(2, 3, 5, 64).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), x + h)


def test_block_by_hand() -> None:
    block = LDMBlock(32, 64, 8, dropout=0.0)
    awake(block)
    x, emb = torch.randn(2, 32, 4, 4, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    h = F.silu(F.group_norm(x, 32, block.norm0.weight, block.norm0.bias, 1e-5))
    h = F.conv2d(h, block.conv0.weight, block.conv0.bias, padding=1)
    h = h + (emb @ block.affine.weight.T + block.affine.bias)[:, :, None, None]
    h = F.silu(F.group_norm(h, 32, block.norm1.weight, block.norm1.bias, 1e-5))
    h = F.conv2d(h, block.conv1.weight, block.conv1.bias, padding=1)
    assert block.skip is not None
    torch.testing.assert_close(block(x, emb), F.conv2d(x, block.skip.weight, block.skip.bias) + h)


def test_a_fresh_block_passes_its_input_on() -> None:
    block = LDMBlock(32, 32, 8, dropout=0.0, head_channels=8)
    x = torch.randn(2, 32, 4, 4)
    assert torch.equal(block(x, torch.randn(2, 8)), x)


def test_resampling_by_hand() -> None:
    network = build_network(SMALL)
    awake(network)
    encoder, decoder = network.encoders[0], network.decoders[0]
    assert isinstance(encoder, LDMEncoder)
    assert isinstance(decoder, LDMDecoder)
    down, x = encoder.downs[0], torch.randn(1, 32, 4, 6, dtype=torch.float64)
    every = F.conv2d(F.pad(x, (1, 1, 1, 1)), down.weight, down.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(down(x), every[..., ::2, ::2])
    up, x = decoder.ups[0], torch.randn(1, 128, 2, 3, dtype=torch.float64)
    doubled = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(x), F.conv2d(doubled, up[1].weight, up[1].bias, padding=1))  # type: ignore[index]


def test_attention_follows_every_block_of_its_level_and_the_middle() -> None:
    encoder = ["encoders.0.levels.0.0", "encoders.0.levels.0.1", "encoders.0.middle.block0"]
    first, second = ([f"decoders.{k}.levels.1.{j}" for j in range(3)] for k in range(2))
    assert attending(SMALL) == encoder + first + second
    assert attending(replace(SMALL, decoder_attention=(True, True))) == encoder + first + second
    assert attending(replace(SMALL, decoder_attention=(True, False))) == encoder + first
    assert attending(replace(SMALL, decoder_attention=(False, False))) == encoder


def test_separate_networks_keep_their_own_attention() -> None:
    names = attending(replace(SMALL, separate=True, decoder_attention=(False, True)))
    assert [name for name in names if name.startswith("decoders")] == [f"decoders.1.levels.1.{j}" for j in range(3)]
    assert len([name for name in names if name.startswith("encoders")]) == 6


def test_the_last_layers_start_at_zero_and_learn() -> None:
    torch.manual_seed(0)
    network: MultiDecoderNetwork = build_network(SMALL)
    zero = {n for n, p in network.named_parameters() if n.endswith("weight") and not p.any()}
    last = ("conv1.weight", "proj.weight", "conv_out.weight")
    assert zero == {n for n, _ in network.named_parameters() if n.endswith(last)}
    x = torch.randn(2, 4, 4, 4)
    (network(x, torch.tensor([3.0, 800.0]), [1, 1]) - 1).square().mean().backward()
    for decoder in network.decoders:
        assert isinstance(decoder, LDMDecoder)
        assert decoder.conv_out.weight.grad is not None
        assert decoder.conv_out.weight.grad.any()


def test_asymmetric_padding_is_below_and_on_the_right() -> None:
    layer = awake(AsymmetricDown(1, 1, 3, 2))
    x = torch.randn(1, 1, 4, 6, dtype=torch.float64)
    padded = torch.cat([torch.cat([x, x.new_zeros(1, 1, 4, 1)], 3), x.new_zeros(1, 1, 1, 7)], 2)
    expected = F.conv2d(padded, layer.weight, layer.bias, stride=2)  # type: ignore[arg-type]
    assert torch.equal(layer(x), expected)
    assert layer(x).shape == (1, 1, 2, 3)


def test_scale_and_shift_act_after_the_second_norm() -> None:
    block = LDMBlock(32, 32, 8, dropout=0.0, scale_shift=True)
    awake(block)
    x, emb = torch.randn(2, 32, 3, 3, dtype=torch.float64), torch.randn(2, 8, dtype=torch.float64)
    scale, shift = block.affine(emb)[:, :, None, None].split(32, dim=1)
    h = block.norm1(block.conv0(F.silu(block.norm0(x)))) * (1 + scale) + shift
    torch.testing.assert_close(block(x, emb), x + block.conv1(F.silu(h)))


def test_the_variants_are_settings() -> None:
    config = replace(
        SMALL,
        head_channels=None,
        middle_attention="none",
        group_count=8,
        norm_eps=1e-3,
        down_padding="asymmetric",
        scale_shift=True,
        num_classes=3,
        label_embedding="output",
    )
    network = build_network(config)
    norms = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {(norm.num_groups, norm.eps) for norm in norms} == {(8, 1e-3)}
    attentions = [m for m in network.modules() if isinstance(m, HeadedAttention)]
    assert attentions
    assert all(m.head_channels == m.proj.in_features for m in attentions)
    assert not any(name.startswith("encoders.0.middle") for name in attending(config))
    assert all(isinstance(m, AsymmetricDown) for m in network.encoders[0].downs)  # type: ignore[union-attr]
    assert network.encoders[0].embedding.label.weight.shape == (128, 3)  # type: ignore[union-attr]
    assert network(torch.randn(2, 4, 5, 6), torch.ones(2), [1, 1]).shape == (2, 4, 5, 6)
