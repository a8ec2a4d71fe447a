from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets.test_network import awake, batch, gradients
from torch import Tensor, nn

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.blocks import SQRT_HALF
from multistage_diffusion.nets.meme import InceptionMixer, MEMEBlock, PooledAttention, depthwise

SHARES = (0.0, 0.5, 1.0)
COUNTS = [2, 1, 2]


def small(**changes: Any) -> NetworkConfig:
    base: dict[str, Any] = {
        "family": "meme",
        "channels": 2,
        "decoder_widths": (8, 12, 8),
        "separate": True,
        "channel_mult": (1, 2, 2),
        "blocks_per_level": 1,
        "attention_factors": (1, 2, 4),
        "attention_shares": SHARES,
        "num_classes": 4,
        "augment_dim": 3,
        "dropout": 0.0,
    }
    return NetworkConfig.of(**base | changes)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "network.attention_shares=None needs a number in [0, 1] for each of the 1 stages"),
    ({"attention_shares": (0.5, 0.5)}, "network.attention_shares=[0.5, 0.5] needs one value"),
    ({"attention_shares": (1.5,)}, "network.attention_shares=[1.5] needs a number in [0, 1]"),
    ({"attention_shares": (-0.5,)}, "network.attention_shares=[-0.5] needs a number in [0, 1]"),
    ({"attention_shares": (math.nan,)}, "network.attention_shares=[nan] needs a number"),
    (
        {"decoder_widths": (64, 64), "attention_shares": (0.2, 0.8)},
        "network.separate=False: the 2 experts of network.family=meme share nothing; set it to true",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[str(b) for b, _ in REFUSED])
def test_refused_values_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        NetworkConfig.of("meme", **bad)
    assert message in str(error.value)


def randomised(module: nn.Module) -> nn.Module:
    """In float64, with ordinary random weights: the last layers start too near zero to test."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.double().eval()


# -- the mixer ----------------------------------------------------------------------------------------------------------


def by_hand(mixer: InceptionMixer, x: Tensor, low: int, pool: int) -> Tensor:
    """The mixer's definition written out, with a loop over positions for the attention."""

    def pointwise(layer: nn.Conv2d, maps: Tensor) -> Tensor:
        return torch.einsum("oc,bchw->bohw", layer.weight[:, :, 0, 0], maps) + layer.bias[:, None, None]

    def each_channel(layer: nn.Conv2d, maps: Tensor) -> Tensor:
        convolved = [F.conv2d(maps[:, i : i + 1], layer.weight[i : i + 1], padding=1) for i in range(maps.shape[1])]
        return torch.cat(convolved, dim=1) + layer.bias[:, None, None]

    half = (x.shape[1] - low) // 2
    a, b, c = x[:, :half], x[:, half : 2 * half], x[:, 2 * half :]
    windows = F.unfold(F.pad(a, (1, 1, 1, 1), value=-torch.inf), 3).unflatten(1, (half, 9))
    parts = [
        pointwise(mixer.pooled, windows.amax(dim=2).view_as(a)),
        each_channel(mixer.convolved[1], pointwise(mixer.convolved[0], b)),
    ]
    means = c.unflatten(3, (-1, pool)).mean(4).unflatten(2, (-1, pool)).mean(3)
    q, k, v = (t.flatten(2) for t in pointwise(mixer.attention.qkv, means).chunk(3, dim=1))  # (B, low, N)
    mixed = torch.empty_like(q)
    for row in range(len(x)):
        for i in range(q.shape[2]):
            weights = torch.softmax(q[row, :, i] @ k[row] / low**0.5, dim=0)
            mixed[row, :, i] = v[row] @ weights
    attended = pointwise(mixer.attention.proj, mixed.view_as(means))
    parts.append(attended.repeat_interleave(pool, dim=2).repeat_interleave(pool, dim=3))
    y = torch.cat(parts, dim=1)
    return pointwise(mixer.proj, y + each_channel(mixer.local, y))


@pytest.mark.parametrize("pool", [1, 2])
def test_a_mixer_is_its_definition(pool: int) -> None:
    mixer = randomised(InceptionMixer(10, 0.4, pool))
    x = torch.randn(2, 10, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), by_hand(mixer, x, 4, pool))


@pytest.mark.parametrize(
    ("share", "sizes"),
    [(0.0, [6, 6, 0]), (0.04, [6, 6, 0]), (0.1, [5, 5, 2]), (0.5, [3, 3, 6]), (0.9, [1, 1, 10]), (1.0, [0, 0, 12])],
)
def test_a_share_divides_the_channels_evenly(share: float, sizes: list[int]) -> None:
    mixer = InceptionMixer(12, share, 1)
    assert mixer.sizes == sizes
    assert (mixer.attention is None) == (sizes[2] == 0)
    assert (mixer.pooled is None) == (mixer.convolved is None) == (sizes[0] == 0)


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (5, 7), (1, 3), (1, 1)])
@pytest.mark.parametrize("share", SHARES)
def test_a_mixer_keeps_any_size(share: float, size: tuple[int, int], pool: int) -> None:
    mixer = randomised(InceptionMixer(8, share, pool))
    assert mixer(torch.randn(2, 8, *size, dtype=torch.float64)).shape == (2, 8, *size)


def test_the_rest_of_an_odd_size_is_averaged_by_itself() -> None:
    attention = randomised(PooledAttention(4, 2))
    x = torch.randn(1, 4, 5, 3, dtype=torch.float64)
    twice = torch.cat([x, x[:, :, -1:]], dim=2)
    torch.testing.assert_close(attention(x), attention(torch.cat([twice, twice[..., -1:]], dim=3))[..., :5, :3])


def reached(module: nn.Module, *extra: Tensor, size: int = 16) -> Tensor:
    """The pixels (H, W) whose output depends on the pixel in the corner."""
    x = torch.randn(1, 8, size, size, dtype=torch.float64)
    moved = x.clone()
    moved[:, :, 0, 0] += 1.0
    return (module(moved, *extra) - module(x, *extra)).abs().amax(dim=(0, 1)) > 1e-12


@pytest.mark.parametrize("pool", [1, 2])
@pytest.mark.parametrize("share", SHARES)
def test_only_attention_mixes_globally(share: float, pool: int) -> None:
    seen = reached(randomised(InceptionMixer(8, share, pool)))
    if share:
        assert seen.all()
    else:
        assert seen[:3, :3].all()
        assert not seen[3:].any()
        assert not seen[:, 3:].any()


def test_a_convolutional_block_mixes_locally_but_for_its_norms() -> None:
    torch.manual_seed(3)
    emb = torch.randn(1, 16, dtype=torch.float64)
    for share, distance in ((None, 2), (0.0, 4), (0.5, None)):
        block = randomised(MEMEBlock(8, 8, 16, 0.0, share))
        assert reached(block, emb).all()  # GroupNorm's mean is over all pixels
        block.block.norm0 = block.block.norm1 = nn.Identity()
        if block.mixer is not None:
            block.mixer[0] = nn.Identity()
        seen = reached(block, emb)
        if distance is None:
            assert seen.all()
        else:
            assert seen[distance, distance]
            assert not seen[distance + 1 :].any()


def test_a_fresh_mixer_adds_next_to_nothing() -> None:
    torch.manual_seed(0)
    block = MEMEBlock(8, 8, 16, 0.0, 0.5)
    x, emb = torch.randn(2, 8, 6, 6), torch.randn(2, 16)
    torch.testing.assert_close(block(x, emb), block.block(x, emb) * SQRT_HALF, atol=1e-3, rtol=0)


def test_a_fresh_depthwise_convolution_keeps_the_variance() -> None:
    torch.manual_seed(0)
    layer = depthwise(256)
    assert float(layer(torch.randn(4, 256, 32, 32)).detach().std()) == pytest.approx(1.0, abs=0.05)


# -- the network --------------------------------------------------------------------------------------------------------


def test_a_mixed_batch_equals_the_row_by_row_loop_with_gradients() -> None:
    network = awake(small())
    x, noise, cond = batch(5)
    mixed = network(x, noise, COUNTS, cond)
    target = torch.randn_like(mixed)
    (mixed * target).sum().backward()
    mixed_gradients = gradients(network)
    rows = []
    for i, stage in enumerate([0, 0, 1, 2, 2]):
        one = slice(i, i + 1)
        rows.append(network(x[one], noise[one], [int(k == stage) for k in range(3)], cond.rows(one)))
    (torch.cat(rows) * target).sum().backward()
    torch.testing.assert_close(mixed, torch.cat(rows))
    loop_gradients = gradients(network)
    for name, gradient in mixed_gradients.items():
        torch.testing.assert_close(gradient, loop_gradients[name])


def test_a_gradient_reaches_every_parameter() -> None:
    network = awake(small())
    x, noise, cond = batch(5)
    network(x, noise, COUNTS, cond).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name


def test_an_expert_is_a_network_by_itself_and_gets_its_own_rows() -> None:
    network = awake(small())
    x, noise, cond = batch(5)
    whole = network(x, noise, COUNTS, cond)
    for stage, rows in enumerate([slice(0, 2), slice(2, 3), slice(3, 5)]):
        width, share = network.config.decoder_widths[stage], SHARES[stage]
        alone = small(encoder_width=width, decoder_widths=(width,), separate=False, attention_shares=(share,))
        expert = build_network(alone).double().eval()
        expert.encoders[0].load_state_dict(network.encoders[stage].state_dict())
        expert.decoders[0].load_state_dict(network.decoders[stage].state_dict())
        torch.testing.assert_close(expert(x[rows], noise[rows], [COUNTS[stage]], cond.rows(rows)), whole[rows])


def test_every_mixer_of_an_expert_has_its_share() -> None:
    network = build_network(small(attention_factors=(2,)))
    for side in (network.encoders, network.decoders):
        for share, part in zip(SHARES, side, strict=True):
            mixers = {name: m for name, m in part.named_modules() if isinstance(m, InceptionMixer)}
            where = {"levels.1.0", "bottom0"} if side is network.encoders else {"levels.1.0", "levels.1.1"}
            assert {name.removesuffix(".mixer.1") for name in mixers} == where
            for mixer in mixers.values():
                assert mixer.sizes[2] == share * sum(mixer.sizes)


def test_attention_is_pooled_at_full_resolution_only() -> None:
    network = build_network(small(decoder_widths=(8,), attention_shares=(0.5,)))
    pools = {
        name: isinstance(module.down, nn.AvgPool2d)
        for name, module in network.named_modules()
        if isinstance(module, PooledAttention)
    }
    fine = {name for name, pooled in pools.items() if pooled}
    assert len(pools) == 3 + 1 + 6
    assert {name.partition(".mixer")[0] for name in fine} == {
        "encoders.0.levels.0.0",
        "decoders.0.levels.2.0",
        "decoders.0.levels.2.1",
    }


@pytest.mark.parametrize("size", [(5, 7), (8, 12), (1, 3)])
def test_any_size_is_replicated_and_cropped(size: tuple[int, int]) -> None:
    network = awake(small())
    x, noise, cond = batch(5, *size)
    result = network(x, noise, COUNTS, cond)
    assert result.shape == x.shape
    full = [-(-length // 4) * 4 for length in size]
    padded = F.pad(x, (0, full[1] - size[1], 0, full[0] - size[0]), mode="replicate")
    torch.testing.assert_close(result, network(padded, noise, COUNTS, cond)[..., : size[0], : size[1]])


def test_one_level_of_an_odd_size() -> None:
    network = awake(small(channel_mult=(1,), attention_factors=(1,)))
    x, noise, cond = batch(5, 5, 3)
    assert network(x, noise, COUNTS, cond).shape == x.shape


def test_a_fresh_network_is_nearly_zero_and_trains_in_bfloat16_and_channels_last() -> None:
    torch.manual_seed(0)
    network = build_network(small()).eval()
    x, noise, _ = batch(5)
    assert 0 < float(network(x.float(), noise, COUNTS).detach().abs().max()) < 1e-3
    network = awake(small()).float().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    full = network(x.float(), noise, COUNTS).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x.float().to(memory_format=torch.channels_last), noise, COUNTS)
    half.float().square().mean().backward()
    assert half.dtype == torch.bfloat16
    assert float((half - full).detach().norm() / full.norm()) < 0.1
    assert all(bool(p.grad.isfinite().all()) for p in network.parameters() if p.grad is not None)
