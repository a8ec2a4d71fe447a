"""Colours of all pictures: one per stage, told apart with any colour vision; the page's names for them.

A picture is drawn in the colours of a light page. `css` maps them to variables of the report's page, which has a light and
a dark theme.
"""

from __future__ import annotations

from functools import cache

from matplotlib.axes import Axes

# White text on them has a contrast of at least 4.5; any two differ for every kind of colour vision, see the tests.
STAGE_COLOURS = ("#0072b2", "#c2410c", "#1f4d2b", "#96577f", "#282894", "#51285e")
ON_DARK = (
    "#58aee6",
    "#f58a55",
    "#77c48d",
    "#d79cc2",
    "#9a9cf5",
    "#c596d6",
)  # the same for lines and text on dark pages
SHARED, SHARED_ON_DARK = "#5b6573", "#a3adbb"  # what belongs to no stage

# The page's text, its small print, ground, cards and lines; on the light and on the dark page.
INK, SOFT, PAGE, CARD, LINE = "#1d2330", "#5d6679", "#f4f5f8", "#ffffff", "#e2e5ec"
INK_ON_DARK, SOFT_ON_DARK, PAGE_ON_DARK, CARD_ON_DARK, LINE_ON_DARK = (
    "#e6e9f0",
    "#a3adbd",
    "#12151c",
    "#1b202a",
    "#2d3441",
)
TINT, BAND = 0.3, 0.12  # shares of the colour in the ground of a box, and of a wide band
WHITE = "#fffffe"  # what is white on the dark page, too


def stage_colour(index: int) -> str:
    """Return the colour of stage index 0, 1, ...; they repeat after the last."""
    return STAGE_COLOURS[index % len(STAGE_COLOURS)]


def stage_variable(index: int) -> str:
    """Return the page's CSS for lines and marks of stage index 0, 1, ..."""
    return f"var(--s{index % len(STAGE_COLOURS) + 1})"


def tint(colour: str, share: float = TINT) -> str:
    """Return a colour, "#rrggbb", mixed with white."""
    return _hex(tuple(255 - share * (255 - part) for part in _parts(colour)))


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, from 1 to 21, as the Web Content Accessibility Guidelines 2 define it."""
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@cache
def css() -> dict[str, str]:
    """Return the page's CSS for each colour in which pictures are drawn."""
    known = {INK: "currentColor", SOFT: "var(--soft)", LINE: "var(--line)", CARD: "var(--card)"}
    names = {**{c: f"var(--s{k})" for k, c in enumerate(STAGE_COLOURS, start=1)}, SHARED: "var(--shared)"}
    mixed = {
        tint(c, share): f"color-mix(in srgb, {name} {share:.0%}, var(--card))"
        for c, name in names.items()
        for share in (TINT, BAND)
    }
    return known | names | mixed


def variables(*, dark: bool) -> str:
    """Return the definitions of the page's variables."""
    page = (
        (INK_ON_DARK, SOFT_ON_DARK, PAGE_ON_DARK, CARD_ON_DARK, LINE_ON_DARK) if dark else (INK, SOFT, PAGE, CARD, LINE)
    )
    named = dict(zip(("ink", "soft", "page", "card", "line"), page, strict=True))
    named |= {f"s{k}": c for k, c in enumerate(ON_DARK if dark else STAGE_COLOURS, start=1)}
    named["shared"] = SHARED_ON_DARK if dark else SHARED
    return "; ".join(f"--{name}: {colour}" for name, colour in named.items())


def _parts(colour: str) -> tuple[int, int, int]:
    value = int(colour.removeprefix("#"), 16)
    return value >> 16, value >> 8 & 255, value & 255


def _hex(parts: tuple[float, ...]) -> str:
    return "#" + "".join(f"{round(part):02x}" for part in parts)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (p / 255 for p in _parts(colour))]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def figure_width(axes: Axes) -> float:
    """Return the width in inches of the whole figure of axes, also of axes in a sub-figure."""
    part = axes.figure
    assert part is not None
    return float(part.figure.get_figwidth())  # the figure of a sub-figure is the whole one
