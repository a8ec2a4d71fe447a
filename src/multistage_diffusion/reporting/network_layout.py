"""Positions of the blocks of a multi-decoder U-Net in a drawing to scale; all lengths are in inches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..config.network import NetworkConfig
from ..nets.unet import attends

HIGHEST = 1.4  # height of blocks of full resolution
COLUMN, GAP = 1.5, 0.55  # width of a column (that of the block with most channels); space between columns
PAIR, PAIR_GAP, NEXT_PAIR = 1.1, 0.4, 0.65  # the same for separate networks; space between two of them
ROW, ROW_GAP = 0.2, 0.42  # least height of a row; space between rows, for skip connections
LEFT, RIGHT, TOP, BOTTOM = 1.7, 0.65, 2.85, 2.35  # margins: title and heads above, shares and key below
NARROWEST = 7.8  # least width, for the title

Plan = list[tuple[int, int, bool]]  # row, channels and attention of a part's blocks, downwards


@dataclass(frozen=True, kw_only=True)
class Block:
    """All residual blocks of one part of the network at one resolution.

    Attributes:
        row: level, 0 for full resolution; the number of levels for the middle of the U.
        channels: number of channels of its feature maps.
        attention: whether it has attention.
        x, y: its centre, y upwards.
        width, height: proportional to channels and to the height of its feature maps.
    """

    row: int
    channels: int
    attention: bool
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
    """Feature maps of one resolution, (height, width) in pixels; their blocks are centred at y."""

    size: tuple[int, int]
    y: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Positions of all parts of a drawing.

    Attributes:
        width, height: size of the drawing.
        channel, pixel: the width of one channel and the height of one pixel.
        rows: levels from full resolution down, then the middle.
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

    A row holds the feature maps of one resolution. Heights of blocks are proportional to pixels, widths to channels.
    The middle of the U is in the column of the part that owns it: the encoder, or each of DDPM++'s decoders.
    """
    stages = list(range(len(config.decoder_widths)))
    teams = [[k] for k in stages] if config.separate else [stages]
    plans = [[_encoder(config, team[0]), *(_decoder(config, k) for k in team)] for team in teams]
    across, gap = (PAIR, PAIR_GAP) if config.separate else (COLUMN, GAP)
    channel = across / max(channels for group in plans for plan in group for _, channels, _ in plan)
    rows, pixel = _rows(config, height, width)
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
        height=rows[0].y + rows[0].height / 2 + TOP,
        channel=channel,
        pixel=pixel,
        rows=rows,
        groups=tuple(groups),
    )


def _encoder(config: NetworkConfig, stage: int) -> Plan:
    width = config.decoder_widths[stage] if config.separate else config.encoder_width
    attentive = _mixes(config, stage)
    plan = [(i, width * mult, attentive and attends(config, i)) for i, mult in enumerate(config.channel_mult)]
    return plan if config.family == "ddpmpp" else [*plan, (len(plan), plan[-1][1], attentive)]


def _decoder(config: NetworkConfig, stage: int) -> Plan:
    width = config.decoder_widths[stage]
    attentive = _mixes(config, stage) and (config.decoder_attention is None or config.decoder_attention[stage])
    plan = [(i, width * mult, attentive and attends(config, i)) for i, mult in enumerate(config.channel_mult)]
    entering = (width if config.separate else config.encoder_width) * config.channel_mult[-1]
    return [*plan, (len(plan), entering, True)] if config.family == "ddpmpp" else plan


def _mixes(config: NetworkConfig, stage: int) -> bool:
    """Return whether a stage has attention; a MEME expert may have a share of 0."""
    return config.attention_shares is None or config.attention_shares[stage] > 0


def _rows(config: NetworkConfig, height: int, width: int) -> tuple[tuple[Row, ...], float]:
    """Return the rows and the height of a pixel."""
    levels = len(config.channel_mult)
    multiple = 2 ** (levels - 1)  # the network pads sides to a multiple of this
    full = [-(-side // multiple) * multiple for side in (height, width)]
    pixel, y, rows = HIGHEST / full[0], BOTTOM, []
    for level in (levels - 1, *reversed(range(levels))):
        size = (full[0] >> level, full[1] >> level)
        room = max(size[0] * pixel, ROW)
        rows.append(Row(size=size, y=y + room / 2, height=size[0] * pixel))
        y += room + ROW_GAP
    return tuple(reversed(rows)), pixel


def _column(part: str, stage: int | None, plan: Plan, rows: Sequence[Row], channel: float, x: float) -> Column:
    blocks = tuple(
        Block(
            row=row,
            channels=channels,
            attention=attention,
            x=x,
            y=rows[row].y,
            width=channels * channel,
            height=rows[row].height,
        )
        for row, channels, attention in plan
    )
    return Column(part=part, stage=stage, x=x, blocks=blocks)
