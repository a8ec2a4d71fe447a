"""Parts of a self-contained HTML page: tables, pictures, charts that follow the page's light or dark theme."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from .. import palette
from ..escaping import shown
from ..palette import figure_width, stage_colour, stage_variable
from .pictures import data_uri

LEAST = 1000.0  # pixels: no drawing needs more
WIDE, NARROW = 10.0, 3.8  # widths of a chart in inches, for wide and narrow pages; both are in the page

# a page uses only its own style and pictures: no scripts, no network
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

STYLE = (
    f"""
:root {{ color-scheme: light dark; {palette.variables(dark=False)}; --accent: #1f7267 }}
@media (prefers-color-scheme: dark) {{ :root {{ {palette.variables(dark=True)}; --accent: #5fd0bd }} }}
"""
    + """
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--ink); font: 16px/1.55 system-ui, sans-serif;
  print-color-adjust: exact; -webkit-print-color-adjust: exact }
header, nav, main { max-width: 1080px; margin: 0 auto; padding: 0 24px }
header { padding-top: 48px }
header p { margin: 0; color: var(--accent); font-size: 13px; font-weight: 600; letter-spacing: .08em;
  text-transform: uppercase }
h1 { margin: 4px 0 20px; font-size: 34px; line-height: 1.2; overflow-wrap: anywhere }
h2 { margin: 0 0 18px; font-size: 20px }
dl { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1px; margin: 0 0 20px;
  background: var(--card); border: 1px solid var(--line); border-radius: 12px; overflow: hidden }
dl div { padding: 12px 16px; box-shadow: 0 0 0 1px var(--line) }
dt { color: var(--soft); font-size: 13px }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; margin-bottom: 20px }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 24px;
  margin-bottom: 20px }
.scroll { overflow-x: auto }
.scroll:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
.drawing svg { min-width: var(--w) }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 9px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
thead th { color: var(--soft); font-size: 13px; font-weight: 500 }
tbody tr:last-child > * { border-bottom: 0 }
th:first-child { padding-left: 0; text-align: left; font-weight: 600 }
tbody > tr > * { vertical-align: top }
.words { text-align: left; white-space: normal; min-width: 300px; color: var(--soft) }
figure { margin: 20px 0 0 }
figure:first-child { margin-top: 0 }
figcaption, .note { margin: 10px 0 0; color: var(--soft); font-size: 14px }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; image-rendering: pixelated }
img.smooth { image-rendering: auto; width: 100% }
@media (prefers-color-scheme: dark) { img.smooth { filter: invert(.9) hue-rotate(180deg) } }
svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round }
svg text { font-family: inherit !important }
svg.narrow { display: none }
@media (max-width: 700px) { svg.narrow { display: block } svg.wide { display: none } }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 24px }
.pair figure { margin: 0 }
.pair img { width: 100% }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(130px, 1fr)); gap: 16px }
.pairs + *, .pair + .pairs { margin-top: 20px }
.pairs figure { margin: 0 }
.pairs img { width: 100% }
.pairs figcaption { margin-top: 4px; text-align: center; font-size: 13px }
.bar { display: flex; height: 32px; border-radius: 8px; overflow: hidden; gap: 2px; white-space: nowrap }
.bar div { background: var(--c); color: #fff; min-width: 3px; padding: 4px 0 0 8px; overflow: hidden; line-height: 24px;
  font-size: 14px }
.bar div { box-shadow: inset 0 -4px 0 var(--e); container-type: inline-size }
.bar b { margin-right: 8px }
@container (max-width: 52px) { .bar span { display: none } }
@container (max-width: 20px) { .bar b { display: none } }
.measure { margin: 16px 0 4px; font-size: 14px; font-weight: 600 }
.measure:first-child { margin-top: 0 }
.ends { display: flex; justify-content: space-between; margin: 6px 0 12px; color: var(--soft); font-size: 13px }
.key { list-style: none; margin: 18px 0 20px; padding: 0; font-variant-numeric: tabular-nums }
.key b { display: inline-block; min-width: 72px }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; background: var(--c); margin-right: 8px }
pre { margin: 0 0 12px; padding: 14px 16px; background: var(--page); border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--accent); margin-bottom: 10px }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr }
  dl { grid-template-columns: 1fr 1fr } section { padding: 16px 14px }
  header, nav, main { padding-left: 14px; padding-right: 14px } }
@media print { :root { --ink: #000; --soft: #444; --page: #fff; --card: #fff; --line: #ccc }
  body { font-size: 11pt } nav { display: none } header { padding-top: 0 } section { border: 0; padding: 12px 0 }
  figure, tr, .bar, .key { break-inside: avoid } .note { break-before: avoid } h2 { break-after: avoid } }
"""
)


def escape(value: Any) -> str:
    """Return str(value) with HTML's special characters (quotes included) and hidden characters escaped."""
    return html.escape(shown(value, lines=True), quote=True)


def label(value: Any) -> str:
    """Return str(value) as text of a chart: hidden characters escaped, dollar signs not starting a formula."""
    return shown(value).replace("$", r"\$")


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return a whole page of sections (id, title, content); content and header are HTML, titles are text."""
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{n}"><h2>{escape(h)}</h2>{content}</section>' for n, h, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f'<body><header>{header}</header><nav aria-label="Sections">{links}</nav><main>{body}</main></body></html>\n'
    )


def facts(values: dict[str, Any]) -> str:
    """Return names and values as a definition list."""
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items()) + "</dl>"


def table(head: Sequence[str], lines: Sequence[Sequence[Any]], words: int | None = None, name: str = "Table") -> str:
    """Return a table of text, whose first cells name the lines; column `words` is running text, the others numbers."""

    def cell(tag: str, i: int, value: Any, scope: str = "") -> str:
        kind = ' class="words"' if i == words else ""
        return f"<{tag}{f' scope={chr(34)}{scope}{chr(34)}' if scope else ''}{kind}>{escape(value)}</{tag}>"

    top = "".join(cell("th", i, value, "col") if value else "<td></td>" for i, value in enumerate(head))
    body = "".join(
        f"<tr>{cell('th', 0, first, 'row')}{''.join(cell('td', i, c) for i, c in enumerate(others, 1))}</tr>"
        for first, *others in lines
    )
    return scrolling(f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>", name)


def scrolling(content: str, name: str, kind: str = "") -> str:
    """Return content (HTML) in a box that scrolls sideways, also with the keyboard; `name` tells what it is."""
    return f'<div class="scroll{kind}" tabindex="0" role="region" aria-label="{escape(name)}">{content}</div>'


def note(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def picture(image: Image.Image, caption: str, smooth: bool = False, alt: str | None = None) -> str:
    """Return an image with its caption, and a description if that says more.

    Args:
        image: the image.
        caption: text below it.
        smooth: for plots; otherwise pixels stay square when enlarged.
        alt: the description; None: the caption.
    """
    kind = ' class="smooth"' if smooth else ""
    return (
        f'<figure><img{kind} alt="{escape(caption if alt is None else alt)}" src="{data_uri(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def bar(title: str, shares: Sequence[float]) -> str:
    """Return shares of the stages, which add up to 1, as one bar below a line that says what they are shares of."""
    parts = "".join(
        f'<div style="flex:{share:.6f};--c:{stage_colour(k)};--e:{stage_variable(k)}">'
        f"<b>{k + 1}</b><span>{share:.0%}</span></div>"
        for k, share in enumerate(shares)
    )
    return f'<p class="measure">{escape(title)}</p><div class="bar">{parts}</div>'


def chart(draw: Callable[[Figure], None], height: float, caption: str, narrow_height: float | None = None) -> str:
    """Draw a figure with `draw` and return it as SVG inside the page, once for wide and once for narrow pages.

    Args:
        draw: draws into a figure of WIDE or NARROW inches; `is_narrow` tells which.
        height: of the wide one in inches.
        caption: text below it, and its description.
        narrow_height: of the narrow one; None: the same.
    """
    narrow = _figure(draw, NARROW, narrow_height or height, caption)
    both = inline(_figure(draw, WIDE, height, caption), caption, "wide") + inline(narrow, caption, "narrow")
    return f"<figure>{both}<figcaption>{escape(caption)}</figcaption></figure>"


def is_narrow(figure: Figure) -> bool:
    """Return whether a chart is for narrow pages."""
    return bool(figure.get_figwidth() <= NARROW)


def drawing(svg: str, caption: str) -> str:
    """Return a drawing that cannot reflow: on narrow pages it scrolls sideways."""
    width = re.search(r'viewBox="0 0 ([\d.]+) ', svg)
    least = min(0.9 * float(width[1]) if width else LEAST, LEAST)  # at most a wide page; narrow text stays legible
    box = scrolling(inline(svg, caption), caption, " drawing")
    return f'<figure style="--w:{least:.0f}px">{box}<figcaption>{escape(caption)}</figcaption></figure>'


def _figure(draw: Callable[[Figure], None], width: float, height: float, caption: str) -> str:
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), palette.INK)
    spines = dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    style: Any = {**ink, **spines, "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": f"{caption} {width}"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def inline(svg: str, title: str, kind: str = "") -> str:
    """Return an SVG file as a part of the page: named, in the page's colours.

    What only a separate file needs is removed: prologue, metadata, namespaces, style, names that nothing refers to.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    used = {name for pair in re.findall(r'url\(#([^)"]+)\)|href="#([^"]+)"', svg) for name in pair}
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    svg = re.sub(r"#[0-9a-f]{6}\b", lambda found: palette.css().get(found[0], found[0]), svg)
    start = f'<svg class="{kind}" role="img" aria-label="{escape(title)}"'
    return re.sub(r"<svg([^>]*)>", lambda found: f"{start}{found[1]}><title>{escape(title)}</title>", svg, count=1)


def tidy(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Set scales ("linear" or "log"), ticks in plain numbers (k, M, G on the x axis), a light grid and a left title."""
    axes.set(xscale=x, yscale=y)
    for axis, scale, (low, high) in ((axes.xaxis, x, axes.get_xlim()), (axes.yaxis, y, axes.get_ylim())):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=8))
            axis.set_minor_formatter(NullFormatter())
    if x == "linear" and figure_width(axes) <= NARROW:
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="#8a93a5", alpha=0.25, linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
