"""Positions of the boxes of a multi-decoder network in a drawing to scale; all lengths are in inches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..config.network import NetworkConfig
from .network_boxes import Box, Boxes, Size, network_boxes

HIGHEST = 1.4  # height of blocks of full resolution
COLUMN, GAP = 1.5, 0.55  # width of a column (that of the block with most channels); space between columns
PAIR, PAIR_GAP, NEXT_PAIR = 1.1, 0.4, 0.65  # the same for separate networks; space between two of them
ROW, ROW_GAP = 0.2, 0.42  # least height of a row; space between rows, for skip connections
LEFT, RIGHT, TOP, BOTTOM = 1.7, 0.65, 2.85, 2.35  # margins: title and heads above, shares and key below
NARROWEST = 7.8  # least width, for the title

Key = tuple[Size, int]  # of a row: size of the boxes in it, and how many boxes of a part have this size and lie above


@dataclass(frozen=True, kw_only=True)
class Block:
    """A box with its position.

    Attributes:
        row: index of its row.
        box: what it shows.
        x, y: its centre, y upwards.
        width, height: proportional to channels and to the height of its feature maps.
    """

    row: int
    box: Box
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Column:
    """An encoder or a decoder: its stage (0 for the lowest noise, None if shared) and its blocks, downwards."""

    part: str
    stage: int | None
    x: float
    blocks: tuple[Block, ...]


@dataclass(frozen=True, kw_only=True)
class Row:
    """Features of one size; their boxes are centred at y.

    Attributes:
        size: (height, width) in pixels, or (number of tokens,).
        middle: whether it is the lowest and below other boxes of its size: the middle of a U-Net.
        skips: number of skip connections from the encoder to each decoder.
    """

    size: Size
    middle: bool
    skips: int
    y: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Positions of all parts of a drawing.

    Attributes:
        width, height: size of the drawing.
        channel, pixel: the width of one channel and the height of one pixel.
        rows: from the highest resolution down.
        groups: an encoder with the decoders it feeds: one group if it is shared, else one per stage.
    """

    width: float
    height: float
    channel: float
    pixel: float
    rows: tuple[Row, ...]
    groups: tuple[tuple[Column, ...], ...]


def network_layout(config: NetworkConfig, height: int, width: int) -> Layout:
    """Lay out a network for inputs of height x width pixels, which are padded as the network pads them.

    A row holds the boxes of one resolution. Heights of boxes are proportional to pixels, widths to channels. The middle of
    a U is in the column of the part that owns it: the encoder, or each of DDPM++'s decoders.
    """
    boxes = network_boxes(config, height, width)
    stages = list(range(len(config.decoder_widths)))
    teams = [[k] for k in stages] if config.separate else [stages]
    plans = [[encoder, *(boxes.decoders[k] for k in team)] for encoder, team in zip(boxes.encoders, teams, strict=True)]
    across, gap = (PAIR, PAIR_GAP) if config.separate else (COLUMN, GAP)
    channel = across / max(box.channels for group in plans for plan in group for box in plan)
    rows, pixel = _rows(boxes)
    steps = sum(map(len, plans))
    natural = LEFT + steps * (across + gap) - gap + (len(teams) - 1) * (NEXT_PAIR - gap) + RIGHT
    x, groups = LEFT + max(NARROWEST - natural, 0) / 2 + across / 2, []
    for team, group in zip(teams, plans, strict=True):
        columns = []
        for i, plan in enumerate(group):
            stage = team[i - 1] if i else team[0] if config.separate else None
            columns.append(_column("decoder" if i else "encoder", stage, plan, rows, channel, x))
            x += across + gap
        groups.append(tuple(columns))
        x += NEXT_PAIR - gap
    return Layout(
        width=max(natural, NARROWEST),
        height=next(iter(rows.values())).y + next(iter(rows.values())).height / 2 + TOP,
        channel=channel,
        pixel=pixel,
        rows=tuple(rows.values()),
        groups=tuple(groups),
    )


def _keys(plan: Sequence[Box]) -> list[Key]:
    """Return the row of each box of a part."""
    sizes = [box.size for box in plan]
    return [(size, sizes[:i].count(size)) for i, size in enumerate(sizes)]


def _side(size: Size) -> int:
    """Return the height in pixels; of tokens, that of a square of them."""
    return size[0] if len(size) == 2 else math.isqrt(size[0])


def _rows(boxes: Boxes) -> tuple[dict[Key, Row], float]:
    """Return the rows, from above, and the height of a pixel."""
    keys = {key for plan in (*boxes.encoders, *boxes.decoders) for key in _keys(plan)}
    pixel, y = HIGHEST / max(_side(size) for size, _ in keys), BOTTOM
    rows: list[tuple[Key, Row]] = []
    for key in sorted(keys, key=lambda key: (math.prod(key[0]), -key[1])):
        size, above = key
        tall = _side(size) * pixel
        room, skips = max(tall, ROW), 0 if above else boxes.skips[size]
        rows.append((key, Row(size=size, middle=above > 0 and not rows, skips=skips, y=y + room / 2, height=tall)))
        y += room + ROW_GAP
    return dict(reversed(rows)), pixel


def _column(
    part: str, stage: int | None, plan: Sequence[Box], rows: dict[Key, Row], channel: float, x: float
) -> Column:
    places = list(rows)
    blocks = tuple(
        Block(
            row=places.index(key),
            box=box,
            x=x,
            y=rows[key].y,
            width=box.channels * channel,
            height=rows[key].height,
        )
        for key, box in zip(_keys(plan), plan, strict=True)
    )
    return Column(part=part, stage=stage, x=x, blocks=blocks)
