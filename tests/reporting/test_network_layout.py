from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from multistage_diffusion.config.network import NetworkConfig
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.blocks import Attention
from multistage_diffusion.nets.ldm import HeadedAttention
from multistage_diffusion.nets.meme import PooledAttention
from multistage_diffusion.reporting.network_layout import Block, Column, Layout, network_layout

ATTENTIONS = (Attention, HeadedAttention, PooledAttention)
SMALL: dict[str, Any] = {"channel_mult": (1, 2, 3), "blocks_per_level": 1, "encoder_width": 64}
CONFIGS = {
    "ncsnpp": NetworkConfig.of(family="ncsnpp", decoder_widths=(96, 64, 16), attention_factors=(2,), **SMALL),
    "ddpmpp": NetworkConfig.of(family="ddpmpp", decoder_widths=(96, 16), attention_factors=(1, 4), **SMALL),
    "ldm": NetworkConfig.of(
        family="ldm", decoder_widths=(96, 64), attention_factors=(2, 4), decoder_attention=(True, False), **SMALL
    ),
    "one stage": NetworkConfig.of(family="ncsnpp", decoder_widths=(64,), attention_factors=(), **SMALL),
    "five stages": NetworkConfig.of(
        family="ncsnpp", decoder_widths=(112, 96, 64, 32, 16), attention_factors=(4,), **SMALL
    ),
    "separate ncsnpp": NetworkConfig.of(family="ncsnpp", decoder_widths=(96, 64, 16), separate=True, **SMALL),
    "separate ddpmpp": NetworkConfig.of(family="ddpmpp", decoder_widths=(96, 16), separate=True, **SMALL),
    "meme": NetworkConfig.of(
        family="meme",
        decoder_widths=(96, 64),
        attention_factors=(1, 2),
        attention_shares=(0.0, 0.5),
        separate=True,
        **SMALL,
    ),
}


@pytest.fixture(params=CONFIGS, name="config")
def fixture_config(request: pytest.FixtureRequest) -> NetworkConfig:
    return CONFIGS[request.param]


def columns(layout: Layout) -> list[Column]:
    return [column for group in layout.groups for column in group]


def blocks(layout: Layout) -> list[Block]:
    return [block for column in columns(layout) for block in column.blocks]


def attends(module: nn.Module) -> bool:
    return any(isinstance(part, ATTENTIONS) for part in module.modules())


def ran(config: NetworkConfig) -> dict[str, dict[int, tuple[int, int, bool]]]:
    """Run the real network on 32 x 16 images; per part and row: channels, height and attention of its last block."""
    with torch.device("meta"):
        network = build_network(config).eval()
    found: dict[str, dict[int, tuple[int, int, bool]]] = {}
    levels = len(config.channel_mult)

    def note(part: str, row: int, module: nn.Module, watched: nn.Module) -> None:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            last = output[-1] if isinstance(output, list) else output
            found.setdefault(part, {})[row] = (last.shape[1], last.shape[2], attends(module))

        watched.register_forward_hook(hook)

    for name, part in network.parts().items():
        for i, level in enumerate(part.levels):
            row = i if name.startswith("encoder") else levels - 1 - i
            note(name, row, level, level[-1] if isinstance(level, nn.ModuleList) else level)
        for name_of_middle in ("bottom", "middle"):
            if hasattr(part, name_of_middle):
                middle = getattr(part, name_of_middle)
                note(name, levels, middle, middle)
        if hasattr(part, "bottom0"):
            note(name, levels, part.bottom0, part.bottom1)
    with torch.no_grad():
        rows = len(config.decoder_widths)
        network(torch.empty(rows, 3, 32, 16, device="meta"), torch.empty(rows, device="meta"), [1] * rows)
    return found


def test_every_block_is_that_of_the_real_network(config: NetworkConfig) -> None:
    layout = network_layout(config, 32, 16)
    drawn = {}
    for column in columns(layout):
        name = column.part if column.stage is None else f"{column.part}.{column.stage + 1}"
        drawn[name] = {b.row: (b.box.channels, layout.rows[b.row].size[0], b.box.attention) for b in column.blocks}
    assert drawn == ran(config)


def test_blocks_are_to_scale(config: NetworkConfig) -> None:
    layout = network_layout(config, 32, 16)
    for block in blocks(layout):
        assert block.width == pytest.approx(block.box.channels * layout.channel)
        assert block.height == pytest.approx(layout.rows[block.row].size[0] * layout.pixel)


def test_one_encoder_feeds_all_decoders_unless_networks_are_separate(config: NetworkConfig) -> None:
    layout = network_layout(config, 32, 16)
    stages = range(len(config.decoder_widths))
    found = [[(column.part, column.stage) for column in group] for group in layout.groups]
    if config.separate:
        assert found == [[("encoder", k), ("decoder", k)] for k in stages]
    else:
        assert found == [[("encoder", None), *(("decoder", k) for k in stages)]]


def test_nothing_overlaps_or_leaves_the_picture(config: NetworkConfig) -> None:
    layout = network_layout(config, 32, 16)
    for one, other in itertools.combinations(blocks(layout), 2):
        apart = abs(one.x - other.x) >= (one.width + other.width) / 2 + 0.3
        above = abs(one.y - other.y) >= (one.height + other.height) / 2 + 0.3
        assert apart or above
    for block in blocks(layout):
        assert block.x - block.width / 2 > 1.5  # right of the rows' names
        assert block.x + block.width / 2 < layout.width - 0.3
        assert block.y - block.height / 2 > 1.5  # above the shares
        assert block.y + block.height / 2 < layout.height - 1.5
    xs = [column.x for column in columns(layout)]
    assert xs == sorted(xs)


def test_rows_name_the_padded_sizes_downwards_and_the_middle() -> None:
    layout = network_layout(CONFIGS["ncsnpp"], 30, 18)
    assert [row.size for row in layout.rows] == [(32, 20), (16, 10), (8, 5), (8, 5)]
    assert [row.middle for row in layout.rows] == [False, False, False, True]
    assert [row.skips for row in layout.rows] == [2, 2, 2, 0]
    assert [row.y for row in layout.rows] == sorted((row.y for row in layout.rows), reverse=True)


def test_the_scale_does_not_depend_on_which_part_is_widest() -> None:
    wide = network_layout(NetworkConfig.of(decoder_widths=(32, 16), encoder_width=128), 32, 32)
    assert max(block.width for block in blocks(wide)) == pytest.approx(256 * wide.channel)
    assert max(block.width for block in blocks(wide)) == pytest.approx(
        max(block.width for block in blocks(network_layout(CONFIGS["five stages"], 32, 32)))
    )
