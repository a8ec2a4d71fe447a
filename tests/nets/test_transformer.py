"""What the transformers share: settings, patches, positions, attention; test_network.py holds what all families share."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import multistage_diffusion
from multistage_diffusion.config import DiffusionConfig, ExecutionConfig, NetworkConfig, RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.errors import UserError
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.nets.transformer import (
    Patches,
    SelfAttention,
    TransformerConfig,
    interpolated,
    sincos_positions,
    unpatched,
)
from multistage_diffusion.reporting.describe import describe, description_table
from multistage_diffusion.reporting.network_boxes import network_boxes
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.schedules.edm import EDM

FAMILIES = ["dit", "uvit"]


def config(family: str, **changes: Any) -> TransformerConfig:
    settings: dict[str, Any] = {
        "channels": 2,
        "encoder_width": 16,
        "decoder_widths": (24, 16, 8),
        "encoder_depth": 3,
        "decoder_depths": (1, 3, 2),
        "head_channels": 8,
        "size": (8, 8),
    }
    found = NetworkConfig.of(family, **settings | changes)
    assert isinstance(found, TransformerConfig)
    return found


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"patch": 0}, "network.patch=0 must be positive"),
    ({"encoder_depth": 0}, "network.encoder_depth=0 must be positive"),
    ({"encoder_depth": 1001}, "network.encoder_depth 1001 is more than 1000"),
    ({"head_channels": 0}, "network.head_channels=0 must be positive"),
    ({"decoder_depths": (1, 0, 1)}, "network.decoder_depths=[1, 0, 1] must be positive"),
    ({"decoder_depths": (1, 2)}, "network.decoder_depths=[1, 2] needs one value for each of the 3 stages"),
    ({"decoder_head_channels": (8, 8, 0)}, "network.decoder_head_channels=[8, 8, 0] must be positive"),
    ({"mlp_ratio": 0.0}, "network.mlp_ratio=0.0 must be in (0, 100]"),
    ({"size": (0, 8)}, "network.size=[0, 8] must be positive"),
    ({"encoder_width": 20},
     "network.encoder_width: width 20 is not divisible into heads of network.head_channels=8; use a multiple of 8, such as 16, "
     "or head_channels such as 5"),
    (
        {"decoder_head_channels": (8, 8, 3)},
        "network.decoder_widths=[24, 16, 8]: width 8 is not divisible into heads of network.decoder_head_channels=3; use a "
        "multiple of 12, such as 12, or decoder_head_channels such as 2",
    ),
    ({"encoder_width": 18, "head_channels": 2},
     "network.encoder_width: width 18 must be a multiple of 4, which its positions need; use a multiple of 4, such as 16"),
]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[str(b) for b, _ in REFUSED])
def test_refused_values_are_named(family: str, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        config(family, **bad)
    assert message in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_patch_wider_than_the_image_is_refused(family: str) -> None:
    config(family, patch=4).require_size(4, 3)
    with pytest.raises(UserError, match="sides that are multiples of 8, far more than sides of 4"):
        config(family, patch=8).require_size(4, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_memory_format_of_feature_maps_is_refused(family: str) -> None:
    settings: dict[str, Any] = {
        "network": config(family, decoder_widths=(16,), decoder_depths=None),
        "diffusion": DiffusionConfig(precondition="edm", schedule=EDM(), prior=LogNormal()),
    }
    RunConfig(**settings, execution=ExecutionConfig(channels_last=False))
    with pytest.raises(UserError, match=r"execution.channels_last=True: network.family='.*' computes tokens"):
        RunConfig(**settings, execution=ExecutionConfig(channels_last=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_settings_of_u_nets_are_refused_by_name(family: str) -> None:
    with pytest.raises(TypeError, match="channel_mult"):
        config(family, channel_mult=(1, 2))


def test_weights_of_other_heads_compute_something_else() -> None:
    base = config("dit")
    same = replace(base, decoder_head_channels=(8, 8, 4))  # of decoders: each by itself, see training.warm_start
    assert base.functional_settings() == same.functional_settings()
    other = replace(base, head_channels=4)
    assert base.functional_settings() != other.functional_settings()


def test_patches_are_those_of_a_strided_convolution_and_come_back() -> None:
    torch.manual_seed(0)
    patches, conv = Patches(3, 4, 5).double(), nn.Conv2d(3, 5, 4, stride=4).double()
    with torch.no_grad():
        conv.weight.copy_(patches.linear.weight.view_as(conv.weight))
        assert conv.bias is not None
        conv.bias.copy_(patches.linear.bias)
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    torch.testing.assert_close(patches(x), conv(x).flatten(2).transpose(1, 2))
    torch.testing.assert_close(patches(x.to(memory_format=torch.channels_last)), patches(x))
    tokens = torch.stack(  # by hand: patches row by row, each [row, column, channel]
        [
            x[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].permute(0, 2, 3, 1).reshape(2, -1)
            for i in range(2)
            for j in range(3)
        ],
        dim=1,
    )
    assert torch.equal(unpatched(tokens, (2, 3), 4), x)


def test_positions_by_hand() -> None:
    found = sincos_positions(8, (2, 3), (2, 3))
    assert found.shape == (1, 6, 8)
    for n, (row, column) in enumerate((r, c) for r in range(2) for c in range(3)):
        expected = [f(p * 10000 ** (-i / 2)) for p in (column, row) for f in (math.sin, math.cos) for i in range(2)]
        assert found[0, n].tolist() == pytest.approx(expected, abs=1e-7)


def test_positions_of_other_grids_cover_the_same_range() -> None:
    fine, coarse = sincos_positions(16, (6, 4), (3, 2)), sincos_positions(16, (3, 2), (3, 2))
    torch.testing.assert_close(fine.view(1, 6, 4, 16)[:, ::2, ::2], coarse.view(1, 3, 2, 16))


def test_learnt_positions_are_interpolated() -> None:
    base = torch.linspace(0, 1, 8, dtype=torch.float64)[:, None].expand(8, 8).reshape(1, 64, 1)  # rises with the row
    assert interpolated(base, (8, 8), (8, 8)) is base
    finer = interpolated(base, (8, 8), (16, 4)).view(16, 4)
    torch.testing.assert_close(finer, finer[:, :1].expand(16, 4))  # nothing changes along a row
    for row in range(4, 12):  # Keys' cubic with a = -3/4 around the row's centre
        centre = (row + 0.5) / 2 - 0.5
        near = range(int(centre) - 1, int(centre) + 3)
        assert float(finer[row, 0]) == pytest.approx(sum(cubic(centre - i) * i / 7 for i in near), abs=1e-12)


def cubic(x: float) -> float:
    x, a = abs(x), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("head", [8, 4, 16])
def test_attention_equals_explicit_softmax_head_by_head(head: int, qk_norm: bool) -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(16, head, bias=True, qk_norm=qk_norm).double(), torch.randn(2, 5, 16, dtype=torch.float64)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    q, k, v = (F.linear(x, w, b) for w, b in zip(layer.qkv.weight.chunk(3), layer.qkv.bias.chunk(3), strict=True))
    heads = []
    for i in range(16 // head):
        one, other, value = (part[..., head * i : head * (i + 1)] for part in (q, k, v))
        if qk_norm:
            assert layer.norm_q is not None
            assert layer.norm_k is not None
            one, other = (
                part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
                for part, norm in ((one, layer.norm_q), (other, layer.norm_k))
            )
        heads.append((one @ other.transpose(1, 2) / math.sqrt(head)).softmax(-1) @ value)
    torch.testing.assert_close(layer(x), layer.proj(torch.cat(heads, dim=2)))


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_follow_the_setting(family: str) -> None:
    kinds = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}
    for norm, kind in kinds.items():
        found = {
            type(m) for m in build_network(config(family, norm=norm)).modules() if isinstance(m, tuple(kinds.values()))
        }
        assert found == {kind}
    norms = [n for n, _ in build_network(config(family, qk_norm=True)).named_modules() if n.endswith("norm_q")]
    assert len(norms) == 3 + (family == "uvit") + 6  # one in each block


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_width_and_heads_are_those_of_each_stage(family: str) -> None:
    network = build_network(config(family, decoder_head_channels=(12, 8, 2)))
    for decoder, width, depth, head in zip(network.decoders, (24, 16, 8), (1, 3, 2), (12, 8, 2), strict=True):
        layers = [m for m in decoder.modules() if isinstance(m, SelfAttention)]
        assert [layer.head_channels for layer in layers] == [head] * depth
        assert all(layer.proj.out_features == width for layer in layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_heads_and_depth_are_drawn(family: str) -> None:
    base = config(family)
    assert [base.notes(k) for k in range(3)] == [["1 block, 3 heads"], ["3 blocks, 2 heads"], ["2 blocks, 1 head"]]
    boxes = network_boxes(base, 8, 12)
    assert [[(box.channels, box.blocks, box.attention) for box in plan] for plan in boxes.decoders] == [
        [(24, 1, True)],
        [(16, 3, True)],
        [(8, 2, True)],
    ]
    [[encoder]] = boxes.encoders
    assert (encoder.channels, encoder.blocks) == (16, 4 if family == "uvit" else 3)
    tokens = 24 + (family == "uvit")
    assert encoder.size == (tokens,)
    assert boxes.skips == ({(tokens,): 3} if family == "uvit" else {})


def test_a_description_says_what_each_decoder_consists_of() -> None:
    text = description_table(describe(preset("uvit-small-32")))
    lines = ["decoder 1: 6 blocks, 8 heads", "decoder 2: 4 blocks, 6 heads", "decoder 3: 2 blocks, 4 heads"]
    assert [line for line in text.splitlines() if line.startswith("decoder ")] == lines
    assert "decoder 1:" not in description_table(describe(preset("digits")))


def multiply_adds(width: int, tokens: int) -> int:
    """Return those of attention and MLP in a block: products with 12 D² weights, and two of N x N x D."""
    return tokens * 12 * width**2 + 2 * tokens**2 * width


def test_counted_arithmetic_is_that_of_the_formulas() -> None:
    """Attention products included; per token and block 12 D², the skip's 2 D² or the six modulations once per row."""
    uvit = network_cost(config("uvit", decoder_widths=(16,), decoder_depths=None, num_classes=3), 8, 8).stages[0]
    tokens, width = 16 + 2, 16
    blocks = 7 * multiply_adds(width, tokens) + 3 * tokens * 2 * width**2
    ends = 16 * 2 * (width * 4 * 2) + 8 * 8 * 9 * 2 * 2  # patches and pixels, and the last convolution
    assert uvit.multiply_adds == uvit.true_flops // 2 == blocks + ends
    dit = network_cost(config("dit", decoder_widths=(16,), decoder_depths=None), 8, 8).stages[0]
    blocks = 6 * (multiply_adds(width, 16) + 6 * width**2)
    ends = 16 * 2 * (width * 4 * 2) + 2 * width**2 + 256 * width + width**2
    assert dit.multiply_adds == blocks + ends


def test_no_other_file_names_these_families() -> None:
    package = Path(multistage_diffusion.__file__).parent
    own = {"nets/dit.py", "nets/uvit.py"}
    naming = [
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if re.search(r"\b(dit|uvit|u-vit|DiT\w*|UViT\w*)\b", path.read_text(), re.IGNORECASE)
        and "presets" not in path.name
    ]
    assert set(naming) == own
