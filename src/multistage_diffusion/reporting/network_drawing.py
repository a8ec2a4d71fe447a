"""Draws a multi-decoder network to scale: the shared encoder once, and each stage's decoder to its right."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from matplotlib.patheffects import withStroke

from ..config.network import NetworkConfig
from ..palette import CARD, INK, LINE, SHARED, SOFT, stage_colour, tint
from .describe import sampler_words
from .network_layout import BOTTOM, ROW, Block, Column, Layout, network_layout

SKIP = "#a3abb8"  # of skip connections
KEY = 0.82  # height of the legend's first line, in inches


def draw_network(config: NetworkConfig, described: dict[str, Any], kind: str) -> bytes:
    """Draw a network, to scale, with each stage's noise, parameters and arithmetic.

    Args:
        config: the network's configuration.
        described: the result of `describe.describe` for it.
        kind: "png" (150 dots per inch) or "svg" (text as text; the same bytes each time).
    """
    layout = network_layout(config, *described["shape"][1:])
    fonts = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"]}
    style: Any = {**fonts, "svg.fonttype": "none", "svg.hashsalt": "network"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(layout.width, layout.height), facecolor=CARD)
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, layout.width), ylim=(0, layout.height))
        axes.set_axis_off()
        _draw_title(axes, layout, config, described)
        _draw_rows(axes, layout)
        for group in layout.groups:
            _draw_connections(axes, layout, group)
            for column in group:
                _draw_column(axes, column)
            _draw_heads(axes, layout, group, config, described)
        _draw_shares(axes, layout, described)
        _draw_key(axes, layout, described["sampler"]["calls"])
        buffer = io.BytesIO()
        figure.savefig(
            buffer, format=kind, dpi=150, metadata=dict.fromkeys(("Date", "Creator")) if kind == "svg" else None
        )
    return buffer.getvalue()


def _colour(stage: int | None) -> str:
    return SHARED if stage is None else stage_colour(stage)


def _box(axes: Axes, x: float, y: float, width: float, height: float, colour: Any, edge: Any = "none") -> None:
    """Draw a centred rectangle with slightly rounded corners."""
    rounding = min(0.05, width / 3, height / 3)
    style = f"round,pad=0,rounding_size={rounding}"
    corner = (x - width / 2, y - height / 2)
    axes.add_patch(
        FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=edge, linewidth=1.2, zorder=3)
    )


def _line(axes: Axes, points: Sequence[tuple[float, float]], colour: str, width: float) -> None:
    """Draw a path that ends in an arrow; its white rim shows that crossing lines do not meet."""
    rim = [withStroke(linewidth=width + 3, foreground=CARD)]
    xs, ys = zip(*points, strict=True)
    axes.plot(xs, ys, color=colour, linewidth=width, path_effects=rim, zorder=2, solid_joinstyle="round")
    arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=arrow, zorder=4)


def _draw_title(axes: Axes, layout: Layout, config: NetworkConfig, described: dict[str, Any]) -> None:
    y = layout.height - 0.4
    shape = " × ".join(map(str, described["shape"]))
    # a run's name may look like a formula
    axes.text(0.3, y, described["name"], fontsize=17, fontweight="bold", color=INK, va="center", parse_math=False)
    time = "σ" if described["schedule"] == "edm" else "t"
    lines = (
        f"{config.title or config.family} for {described['input']} of {shape}, {_short(described['parameters'])} "
        f"parameters, {_short(described['multiply_adds_by_calls'])} multiply-adds a call",
        f"(mean over {sampler_words(described['sampler'])}; "
        f"{_short(described['multiply_adds_by_length'])} if stages count by their length in {time})",
    )
    for i, text in enumerate(lines):
        axes.text(0.3, y - 0.34 - 0.21 * i, text, fontsize=9.5, color=SOFT, va="center")


def _short(count: float) -> str:
    """Return a count in k, M or G with three digits."""
    for factor, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{letter}"
    return f"{count:.3g}"


def _draw_rows(axes: Axes, layout: Layout) -> None:
    for row in layout.rows:
        size = " × ".join(map(str, row.size)) if len(row.size) == 2 else f"{row.size[0]} tokens"
        axes.text(0.3, row.y, f"{'middle, ' * row.middle}{size}", fontsize=10.5, color=INK, va="center")


def _draw_connections(axes: Axes, layout: Layout, group: Sequence[Column]) -> None:
    """Draw skip connections above the rows and, below them, the output of the encoder's last block."""
    encoder, *decoders = group
    for block in encoder.blocks:
        targets = [target for decoder in decoders for target in decoder.blocks if target.row == block.row]
        if layout.rows[block.row].skips and targets:
            _draw_skips(axes, block, targets)
    last, ends = encoder.blocks[-1], [decoder.blocks[-1] for decoder in decoders]
    below = layout.rows[-1].y - max(layout.rows[-1].height, ROW) / 2 - 0.2
    risers = [[(end.x, below), (end.x, end.y - end.height / 2)] for end in ends]
    _line(axes, [(last.x, last.y), (last.x, below), *risers[-1]], INK, 1.6)
    for riser in risers[:-1]:
        _line(axes, riser, INK, 1.6)
        axes.plot(*riser[0], "o", color=INK, markersize=4, zorder=2.5)


def _draw_skips(axes: Axes, block: Block, targets: Sequence[Block]) -> None:
    """Draw the skip connections of one resolution: straight to one decoder, above the blocks of several."""
    start = block.x + block.width / 2
    edges = [target.x - target.width / 2 for target in targets]
    if len(targets) == 1:
        _line(axes, [(start, block.y), (edges[0], block.y)], SKIP, 1.4)
        return
    above = block.y + max(block.height, ROW) / 2 + 0.15
    trunk = [(start, block.y), (start + 0.2, block.y), (start + 0.2, above)]
    taps = [[(edge - 0.26, above), (edge - 0.26, block.y), (edge, block.y)] for edge in edges]
    _line(axes, trunk + taps[-1], SKIP, 1.4)
    for tap in taps[:-1]:
        _line(axes, tap, SKIP, 1.4)
        axes.plot(*tap[0], "o", color=SKIP, markersize=3.5, zorder=2.5)


def _draw_column(axes: Axes, column: Column) -> None:
    """Draw the blocks of an encoder (read downwards) or of a decoder (read upwards), with their channels."""
    colour, down = _colour(column.stage), column.part == "encoder"
    for block in column.blocks:
        _box(axes, block.x, block.y, block.width, block.height, tint(colour), colour)
        text = f"{block.box.channels}{' ◆' * block.box.attention}"
        room = 0.09 * len(str(block.box.channels)) + 0.16 * block.box.attention + 0.1
        inside = block.width > room and block.height > 0.16
        side = -1 if down else 1  # lines leave an encoder's block on its right and enter a decoder's on its left
        axes.text(
            block.x if inside else block.x + side * (block.width / 2 + 0.07),
            block.y,
            text,
            fontsize=10,
            color=INK,
            ha="center" if inside else "right" if down else "left",
            va="center_baseline",
            zorder=5,
        )
    for upper, lower in zip(column.blocks, column.blocks[1:], strict=False):
        ends = [(upper.x, upper.y - upper.height / 2), (lower.x, lower.y + lower.height / 2)]
        _line(axes, ends if down else ends[::-1], INK, 1.6)
    top = column.blocks[0]
    outside = [(top.x, top.y + top.height / 2 + 0.4), (top.x, top.y + top.height / 2)]
    _line(axes, outside if down else outside[::-1], INK, 1.6)
    axes.text(
        top.x, outside[0][1] + 0.1, "input, σ" if down else "output", fontsize=9, color=SOFT, ha="center", va="center"
    )


def _draw_heads(
    axes: Axes, layout: Layout, group: Sequence[Column], config: NetworkConfig, described: dict[str, Any]
) -> None:
    """Write the stage, noise and calls above each decoder or each separate network."""
    y = layout.rows[0].y + layout.rows[0].height / 2 + 1.5
    stages, (encoder, *decoders) = described["stages"], group
    total = described["sampler"]["calls"]
    if encoder.stage is None:
        name = "Shared encoder" if len(decoders) > 1 else "Encoder"
        _draw_head(axes, encoder.x, y, [name, "every σ", "every call"], SHARED)
    for column in decoders:
        stage = stages[column.stage or 0]
        x = column.x if encoder.stage is None else (encoder.x + column.x) / 2
        low, high = stage["sigma"]
        lines = [f"Stage {stage['stage']}", f"σ in [{low:.3g}, {'∞' if high is None else format(high, '.3g')})"]
        if described["schedule"] != "edm":  # EDM's time is sigma
            lines.append(f"t in [{stage['t'][0]:.3g}, {stage['t'][1]:.3g}{']' if high is None else ')'}")
        lines.append(f"{stage['calls']} of {total} calls")
        _draw_head(axes, x, y, [*lines, *config.notes(column.stage or 0)], _colour(column.stage))


def _draw_head(axes: Axes, x: float, y: float, lines: Sequence[str], colour: str) -> None:
    axes.text(x, y, lines[0], fontsize=12, fontweight="bold", color=colour, ha="center", va="center")
    for i, line in enumerate(lines[1:], start=1):
        axes.text(x, y - 0.04 - 0.19 * i, line, fontsize=9.5, color=INK, ha="center", va="center")


def _draw_shares(axes: Axes, layout: Layout, described: dict[str, Any]) -> None:
    """Draw each part's share of the parameters and of the multiply-adds, as numbers and bars."""
    stages, top = described["stages"], BOTTOM - 0.55
    whole = {
        "parameters": described["parameters"],
        "multiply_adds": sum(s["calls"] * s["multiply_adds"] for s in stages),
    }
    for i, name in enumerate(whole):
        y = top - 0.47 * i
        axes.text(0.3, y, name.replace("_", "-"), fontsize=9.5, color=INK, va="center")
        for x, stage in _share_places(layout):
            shared = described[f"shared_{name}"]
            value = shared if stage is None else stages[stage][name] - shared
            calls = described["sampler"]["calls"] if stage is None else stages[stage]["calls"]
            share = value * (1 if name == "parameters" else calls) / whole[name]
            axes.text(x - 0.65, y + 0.08, _short(value), fontsize=9.5, color=INK, va="center")
            percent = f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"
            axes.text(x + 0.65, y + 0.08, percent, fontsize=9.5, color=INK, va="center", ha="right")
            _box(axes, x, y - 0.08, 1.3, 0.09, LINE)
            if share > 0:
                _box(axes, x - 0.65 + 0.65 * share, y - 0.08, 1.3 * share, 0.09, _colour(stage))


def _share_places(layout: Layout) -> list[tuple[float, int | None]]:
    """Return the x position and the stage of each share: one per column, or one per separate network."""
    places: list[tuple[float, int | None]] = []
    for group in layout.groups:
        if group[0].stage is None:
            places += [(column.x, column.stage) for column in group]
        else:
            places.append(((group[0].x + group[1].x) / 2, group[0].stage))
    return places


def _draw_key(axes: Axes, layout: Layout, calls: int) -> None:
    """Draw the legend of the scale, lines, marks and shares, in as many lines as needed."""
    channels, pixels = (2 ** max(int(most).bit_length() - 1, 0) for most in (0.6 / layout.channel, 0.2 / layout.pixel))
    width, skips = channels * layout.channel, [row.skips for row in layout.rows if row.skips]
    unit = "token" if all(len(row.size) == 1 for row in layout.rows) else "pixel"
    items = [
        (f"scale: {channels} channels wide, {pixels} {unit}{'s' if pixels > 1 else ''} high", width),
        ("features", 0.35),
        *([(f"skip connections, {_range(skips)} in each row", 0.35)] if skips else []),
        ("◆ attention", -0.08),
        (_blocks(layout), -0.08),
        (f"percentages: of all parameters; of the multiply-adds of all {calls} calls", -0.08),
    ]
    x, y = 0.3, KEY
    for i, (item, mark) in enumerate(items):
        across = mark + 0.08 + 0.068 * len(item)
        if x > 0.3 and x + across > layout.width - 0.1:
            below_scale = pixels * layout.pixel / 2 + 0.12 if y == KEY else 0.0  # whose box stands in the first line
            x, y = 0.3, y - max(0.24, below_scale)
        if i == 0:
            _box(axes, x + width / 2, y, width, pixels * layout.pixel, LINE, SOFT)
        elif mark > 0:
            _line(axes, [(x, y), (x + mark, y)], *((INK, 1.6) if i == 1 else (SKIP, 1.4)))
        axes.text(x + mark + 0.08, y, item, fontsize=9, color=SOFT, va="center")
        x += across + 0.25


def _blocks(layout: Layout) -> str:
    """Return how many blocks the boxes stand for."""
    found: dict[str, list[int]] = {}
    for column in (column for group in layout.groups for column in group):
        for block in column.blocks:
            where = "the middle" if layout.rows[block.row].middle else f"each {column.part} box"
            found.setdefault(where, []).append(block.box.blocks)
    return "blocks: " + ", ".join(f"{_range(counts)} in {where}" for where, counts in found.items())


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
