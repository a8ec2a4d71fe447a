import dataclasses

import pytest
import torch

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.cost import NetworkCost, network_cost, saved_bytes, weighted_multiply_adds

CIFAR = NetworkConfig.of(encoder_width=128, decoder_widths=(192, 128, 16), blocks_per_level=8)
EDM = NetworkConfig.of(
    family="ddpmpp", encoder_width=128, decoder_widths=(192, 128, 16), channel_mult=(2, 2, 2), blocks_per_level=4
)
TINY = NetworkConfig.of(
    family="ddpmpp",
    channels=1,
    encoder_width=8,
    decoder_widths=(4, 8),
    channel_mult=(1,),
    blocks_per_level=1,
    attention_factors=(),
)


# CelebA-HQ 256 in latents of 3 x 64 x 64: encoder's and decoders' widths; parameters (M) and multiply-adds (G) per stage and
# shared, total parameters, multiply-adds weighted by 8/4/8 of 20 calls; as printed. Only the first decoder attends.
LDM_TABLE = [
    (224, (224,), (274,), None, 274, (88.39,), None, 88.39),
    (192, (224, 192, 160), (238, 189, 161), 79, 428, (80.03, 64.95, 51.87), 16.69, 65.75),
    (160, (224, 192, 128), (206, 158, 108), 55, 361, (72.61, 57.85, 34.38), 11.6, 54.37),
    (224, (224, 192, 128), (274, 224, 170), 108, 452, (88.39, 72.97, 48.17), 22.71, 69.22),
    (224, (256, 192, 128), (316, 224, 170), 108, 494, (105.82, 72.97, 48.17), 22.71, 76.19),
]


def ldm(encoder: int, decoders: tuple[int, ...]) -> NetworkConfig:
    return NetworkConfig.of(
        family="ldm",
        encoder_width=encoder,
        decoder_widths=decoders,
        channel_mult=(1, 2, 3, 4),
        blocks_per_level=2,
        attention_factors=(2, 4, 8),
        decoder_attention=(True, False, False)[: len(decoders)],
    )


@pytest.fixture(scope="module")
def cifar() -> NetworkCost:
    return network_cost(CIFAR, 32, 32)


def test_ncsnpp_parameters_as_printed(cifar: NetworkCost) -> None:
    millions = [round(stage.parameters / 1e6) for stage in cifar.stages]
    # Printed: 169, 108, 47 per stage, 43 shared, 237 in all.
    assert millions == [169, 108, 47]
    assert round(cifar.shared_parameters / 1e6) == 43
    assert round(cifar.total_parameters / 1e6) == 237


def test_ncsnpp_multiply_adds_as_printed(cifar: NetworkCost) -> None:
    giga = [stage.multiply_adds / 1e9 for stage in cifar.stages]
    assert giga == pytest.approx([29.95, 17.65, 6.31], rel=4e-3)
    assert cifar.shared_multiply_adds / 1e9 == pytest.approx(5.75, rel=4e-3)
    # 18.65 is the mean over interval lengths in t, cut at 0.426 and 0.626.
    assert weighted_multiply_adds(cifar, (0.426, 0.2, 0.374)) / 1e9 == pytest.approx(18.65, rel=4e-3)


def test_edm_multistage_as_counted() -> None:
    cost = network_cost(EDM, 32, 32)
    assert [round(stage.parameters / 1e6, 1) for stage in cost.stages] == [87.9, 55.7, 24.4]
    assert round(cost.shared_parameters / 1e6, 1) == 19.6
    assert round(cost.total_parameters / 1e6, 1) == 128.8
    assert [round(stage.multiply_adds / 1e9, 2) for stage in cost.stages] == [35.56, 21.02, 7.58]


def tiny_by_hand(decoder: int, pixels: int) -> tuple[int, int]:
    """Multiply-adds of TINY with one decoder width: (2-d convolutions, everything else)."""

    def block(before: int, after: int) -> int:
        return 9 * before * after + 9 * after * after + (before * after if before != after else 0)

    convolutions = 9 * 8 + block(8, 8)  # encoder: input convolution, one block
    convolutions += 2 * block(8, 8) + 4 * 8 * 8  # bottom: two blocks, attention's projections
    convolutions += block(8 + 8, decoder) + block(decoder + 8, decoder) + 9 * decoder
    embedding = 8 * 32 + 32 * 32
    affine = 32 * (3 * 8 + 2 * decoder)
    return convolutions * pixels, embedding + affine + 2 * pixels * pixels * 8


def test_all_arithmetic_by_hand() -> None:
    cost = network_cost(TINY, 4, 6)
    for stage, width in zip(cost.stages, TINY.decoder_widths, strict=True):
        convolutions, rest = tiny_by_hand(width, 24)
        assert stage.multiply_adds == convolutions
        assert stage.true_flops == 2 * (convolutions + rest)
    assert cost.shared_multiply_adds == (9 * 8 + 2 * 9 * 8 * 8) * 24
    assert cost.shared_true_flops == 2 * (cost.shared_multiply_adds + 8 * 32 + 32 * 32 + 32 * 8)


@pytest.mark.parametrize(
    ("encoder", "decoders", "millions", "shared", "total", "giga", "shared_giga", "weighted"),
    LDM_TABLE,
    ids=["one stage", "T8-1", "T8-2", "T8-3", "T8-4"],
)
def test_ldm_as_printed(
    encoder: int,
    decoders: tuple[int, ...],
    millions: tuple[int, ...],
    shared: int | None,
    total: int,
    giga: tuple[float, ...],
    shared_giga: float | None,
    weighted: float,
) -> None:
    cost = network_cost(ldm(encoder, decoders), 64, 64)
    assert [round(stage.parameters / 1e6) for stage in cost.stages] == list(millions)
    assert round(cost.total_parameters / 1e6) == total
    assert [stage.multiply_adds / 1e9 for stage in cost.stages] == pytest.approx(giga, rel=5e-3)
    calls = (8, 4, 8) if len(decoders) == 3 else (20,)
    assert weighted_multiply_adds(cost, calls) / 1e9 == pytest.approx(weighted, rel=5e-3)
    if shared is not None and shared_giga is not None:
        assert round(cost.shared_parameters / 1e6) == shared
        assert cost.shared_multiply_adds / 1e9 == pytest.approx(shared_giga, rel=5e-3)


def test_ldm_counts_no_projections() -> None:
    config = NetworkConfig.of(
        family="ldm",
        channels=1,
        encoder_width=32,
        decoder_widths=(32,),
        channel_mult=(1, 1),
        blocks_per_level=1,
        attention_factors=(1, 2),
    )
    fine, coarse, square = 8 * 8, 4 * 4, 9 * 32 * 32
    by_hand = (9 * 32 + 2 * square) * fine  # input convolution and a block
    by_hand += (square + 2 * square + 4 * square) * coarse  # down, a block, the middle's two
    cost = network_cost(config, 8, 8)
    assert cost.shared_multiply_adds == by_hand
    joined = 2 * square + square + 2 * 32 * 32  # a decoder's block: 64 to 32, 32 to 32 channels, and its 1x1 skip
    by_hand += 2 * joined * coarse + (square + 2 * joined + 9 * 32) * fine
    assert cost.stages[0].multiply_adds == by_hand


@pytest.mark.parametrize(("family", "scale"), [("ncsnpp", 1), ("ddpmpp", 1), ("ldm", 4)])
def test_separate_networks_share_nothing(family: str, scale: int) -> None:
    config = NetworkConfig.of(
        family=family,  # type: ignore[arg-type]
        decoder_widths=(16 * scale, 8 * scale),
        channel_mult=(1, 2),
        blocks_per_level=1,
        separate=True,
    )
    cost = network_cost(config, 8, 8)
    assert (cost.shared_parameters, cost.shared_multiply_adds, cost.shared_true_flops) == (0, 0, 0)
    assert cost.total_parameters == sum(stage.parameters for stage in cost.stages)
    assert cost.total_parameters == sum(p.numel() for p in build_network(config).parameters())
    for stage, width in zip(cost.stages, config.decoder_widths, strict=True):
        ordinary = NetworkConfig.of(
            family=family,  # type: ignore[arg-type]
            encoder_width=width,
            decoder_widths=(width,),
            channel_mult=(1, 2),
            blocks_per_level=1,
        )
        alone = network_cost(ordinary, 8, 8).stages[0]
        assert (stage.parameters, stage.multiply_adds, stage.true_flops) == (
            alone.parameters,
            alone.multiply_adds,
            alone.true_flops,
        )


@pytest.mark.slow
def test_odd_sizes_count_as_padded(cifar: NetworkCost) -> None:
    assert network_cost(CIFAR, 29, 25).stages == cifar.stages


@pytest.mark.parametrize("weights", [(1.0,), (1.0, -1.0, 1.0), (0.0, 0.0, 0.0)])
def test_bad_weights(cifar: NetworkCost, weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="weights="):
        weighted_multiply_adds(cifar, weights)


def test_ncsnpp_counts_neither_pyramid_nor_projections() -> None:
    config = NetworkConfig.of(
        channels=1,
        encoder_width=8,
        decoder_widths=(8,),
        channel_mult=(1, 1),
        blocks_per_level=1,
    )
    fine, coarse, block = 8 * 8, 4 * 4, 2 * 9 * 8 * 8
    by_hand = (9 * 8 + block) * fine  # input convolution and a block
    by_hand += (block + 8 * 8) * coarse  # down block, with its 1x1 skip
    by_hand += 3 * block * coarse  # a block, two at the bottom
    assert network_cost(config, 8, 8).shared_multiply_adds == by_hand


class MEMEByHand:
    """One expert of MEME counted from its definition: parameters, 2-d convolutions and all other arithmetic."""

    def __init__(self, width: int, share: float) -> None:
        self.share, self.emb = share, 4 * width
        self.parameters = self.convolutions = self.rest = 0
        fine, coarse, deep = 24, 6, 2 * width  # pixels of 4 x 6 and of 2 x 3; channels below full resolution
        self.linear(width, self.emb)
        self.linear(self.emb, self.emb)
        self.conv(9, 1, width, fine)
        self.mixed(width, width, fine, 4)
        self.block(width, width, coarse, skip=True)  # down
        self.mixed(width, deep, coarse, 1)
        self.mixed(deep, deep, coarse, 1)  # bottom
        self.block(deep, deep, coarse)
        self.mixed(deep + deep, deep, coarse, 1)
        self.mixed(deep + width, deep, coarse, 1)
        self.block(deep, deep, fine, skip=True)  # up
        self.mixed(deep + width, width, fine, 4)
        self.mixed(width + width, width, fine, 4)
        self.parameters += 2 * width  # the last norm
        self.conv(9, width, 1, fine)

    def linear(self, before: int, after: int) -> None:
        self.parameters += before * after + after
        self.rest += before * after

    def conv(self, kernel: int, before: int, after: int, pixels: int) -> None:
        self.parameters += kernel * before * after + after
        self.convolutions += kernel * before * after * pixels

    def depthwise(self, channels: int, pixels: int) -> None:
        self.parameters += 9 * channels + channels
        self.convolutions += 9 * channels * pixels

    def block(self, before: int, after: int, pixels: int, skip: bool = False) -> None:
        self.parameters += 2 * before + 2 * after  # norms
        self.conv(9, before, after, pixels)
        self.linear(self.emb, after)
        self.conv(9, after, after, pixels)
        if skip or before != after:
            self.conv(1, before, after, pixels)

    def mixed(self, before: int, after: int, pixels: int, pooled: int) -> None:
        self.block(before, after, pixels)
        low = round(self.share * after)
        high, tokens = (after - low) // 2, pixels // pooled
        self.parameters += 2 * after  # norm
        if high:
            self.conv(1, high, high, pixels)
            self.conv(1, high, high, pixels)
            self.depthwise(high, pixels)
        if low:
            self.conv(1, low, 3 * low, tokens)
            self.conv(1, low, low, tokens)
            self.rest += 2 * tokens * tokens * low
        self.depthwise(after, pixels)
        self.conv(1, after, after, pixels)


def test_meme_by_hand() -> None:
    widths, shares = (8, 16, 8), (0.25, 0.75, 1.0)
    config = NetworkConfig.of(
        family="meme",
        channels=1,
        decoder_widths=widths,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_factors=(1, 2),
        attention_shares=shares,
        separate=True,
    )
    cost = network_cost(config, 4, 6)
    for stage, width, share in zip(cost.stages, widths, shares, strict=True):
        expert = MEMEByHand(width, share)
        assert stage.parameters == expert.parameters
        assert stage.multiply_adds == expert.convolutions
        assert stage.true_flops == 2 * (expert.convolutions + expert.rest)
    assert cost.shared_parameters == 0


SMALL = dataclasses.replace(TINY, encoder_width=16, decoder_widths=(32, 16), channel_mult=(1, 2))


@pytest.mark.parametrize("network", [SMALL, dataclasses.replace(SMALL, dropout=0.3)])
def test_the_memory_of_training_is_what_autograd_really_keeps(network: NetworkConfig) -> None:
    """Counted without arithmetic; here beside real forward passes of 2 and of 5 rows."""
    real = build_network(network).train()

    def kept(rows: int, stage: int) -> int:
        stored: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            return stored.setdefault(tensor.untyped_storage().data_ptr(), tensor)

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            held = real(torch.randn(rows, 1, 8, 12), torch.rand(rows), [rows * (k == stage) for k in range(2)])
        del held
        return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())

    for stage, counted in enumerate(saved_bytes(network, 8, 12)):
        assert kept(5, stage) - kept(2, stage) == pytest.approx(3 * counted, rel=0.05)
