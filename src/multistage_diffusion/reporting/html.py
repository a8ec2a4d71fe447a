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
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter, StrMethodFormatter
from PIL import Image

from ..escaping import shown
from .pictures import data_uri

INK = "#010203"  # placeholder colour in charts, replaced by the page's text colour
COLOURS = ("#1f9e89", "#7a68d8", "#e08a1e", "#d1495b", "#3d85d8", "#8a9a2b", "#b05cb5", "#5f7a8a")

# a page uses only its own style and pictures: no scripts, no network
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"

STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #667085; --page: #f4f5f8; --card: #fff; --line: #e2e5ec;
  --accent: #1f7a6c }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9f0; --soft: #98a2b3; --page: #12151c; --card: #1b202a;
  --line: #2d3441; --accent: #5fd0bd } }
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
  background: var(--line); border: 1px solid var(--line); border-radius: 12px; overflow: hidden }
dl div { background: var(--card); padding: 12px 16px }
dt { color: var(--soft); font-size: 13px }
dd { margin: 0; font-weight: 600; overflow-wrap: anywhere }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: 14px; margin-bottom: 20px }
a { color: var(--accent); text-decoration: none }
a:hover { text-decoration: underline }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 24px;
  margin-bottom: 20px }
.scroll { overflow-x: auto }
table { width: 100%; border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: 9px 12px; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { color: var(--soft); font-size: 13px; font-weight: 500 }
tr:last-child td { border-bottom: 0 }
th:first-child, td:first-child { padding-left: 0; text-align: left; font-weight: 600 }
td { vertical-align: top }
.words { text-align: left; white-space: normal; min-width: 300px; color: var(--soft) }
figure { margin: 20px 0 0 }
figure:first-child { margin-top: 0 }
figcaption, .note { margin: 10px 0 0; color: var(--soft); font-size: 14px }
img { display: block; max-width: 100%; height: auto; border-radius: 6px; image-rendering: pixelated }
img.smooth { image-rendering: auto; width: 100% }
svg { display: block; width: 100%; height: auto }
svg * { stroke-linejoin: round }
svg text { font-family: inherit !important }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 24px }
.pair figure { margin: 0 }
.pair img { width: 100% }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 16px }
.pairs figure { margin: 0 }
.pairs img { width: 100% }
.pairs figcaption { margin-top: 4px; text-align: center; font-size: 13px }
.bar { display: flex; height: 52px; border-radius: 8px; overflow: hidden; gap: 2px }
.bar div { background: var(--c); color: #fff; min-width: 3px; padding: 5px 10px; overflow: hidden; line-height: 1.3 }
.bar span { display: block; font-size: 13px }
.ends { display: flex; justify-content: space-between; margin: 6px 0 12px; color: var(--soft); font-size: 13px }
.key { list-style: none; margin: 0 0 20px; padding: 0; font-variant-numeric: tabular-nums }
.key b { display: inline-block; min-width: 72px }
.key i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; background: var(--c); margin-right: 8px }
pre { margin: 0 0 12px; padding: 14px 16px; background: var(--page); border: 1px solid var(--line); border-radius: 8px;
  overflow-x: auto; font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--accent); margin-bottom: 10px }
@media (max-width: 700px) { .pair { grid-template-columns: 1fr }
  dl { grid-template-columns: 1fr 1fr } section { padding: 18px } }
@media print { :root { --ink: #000; --soft: #444; --page: #fff; --card: #fff; --line: #ccc }
  body { font-size: 11pt } nav { display: none } header { padding-top: 0 } section { border: 0; padding: 12px 0 }
  figure, tr, .bar, .key { break-inside: avoid } .note { break-before: avoid } h2 { break-after: avoid } }
"""


def escape(value: Any) -> str:
    """Return str(value) with HTML's special characters (quotes included) and hidden characters escaped."""
    return html.escape(shown(value, lines=True), quote=True)


def label(value: Any) -> str:
    """Return str(value) as text of a chart: hidden characters escaped, dollar signs not starting a formula."""
    return shown(value).replace("$", r"\$")


def colour(index: int) -> str:
    """Return the colour of stage index 0, 1, ..."""
    return COLOURS[index % len(COLOURS)]


def page(title: str, header: str, sections: Sequence[tuple[str, str, str]]) -> str:
    """Return a whole page of sections (id, title, content); content and header are HTML, titles are text."""
    links = "".join(f'<a href="#{name}">{escape(heading)}</a>' for name, heading, _ in sections)
    body = "".join(f'<section id="{n}"><h2>{escape(h)}</h2>{content}</section>' for n, h, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><header>{header}</header><nav>{links}</nav><main>{body}</main></body></html>\n"
    )


def facts(values: dict[str, Any]) -> str:
    """Return names and values as a definition list."""
    return "<dl>" + "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in values.items()) + "</dl>"


def table(head: Sequence[str], lines: Sequence[Sequence[Any]], words: int | None = None) -> str:
    """Return a table of text; column `words` is set as running text, the others as numbers."""

    def row(tag: str, cells: Sequence[Any]) -> str:
        kinds = (' class="words"' if i == words else "" for i in range(len(cells)))
        return "<tr>" + "".join(f"<{tag}{k}>{escape(c)}</{tag}>" for k, c in zip(kinds, cells, strict=True)) + "</tr>"

    body = "".join(row("td", line) for line in lines)
    return f'<div class="scroll"><table><thead>{row("th", head)}</thead><tbody>{body}</tbody></table></div>'


def note(text: str) -> str:
    """Return a paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>'


def picture(image: Image.Image, caption: str, smooth: bool = False) -> str:
    """Return an image with its caption; `smooth` for plots, otherwise pixels stay square when enlarged."""
    kind = ' class="smooth"' if smooth else ""
    return (
        f'<figure><img{kind} alt="{escape(caption)}" src="{data_uri(image)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def chart(draw: Callable[[Figure], None], height: float, caption: str) -> str:
    """Draw a figure of 10 by `height` inches with `draw` and return it as SVG inside the page."""
    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    spines = dict.fromkeys(("axes.spines.top", "axes.spines.right"), False)
    style: Any = {**ink, **spines, "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": caption}
    with mpl.rc_context(style):
        figure = Figure(figsize=(10, height), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return f"<figure>{_inline(buffer.getvalue())}<figcaption>{escape(caption)}</figcaption></figure>"


def _inline(svg: str) -> str:
    """Strip what only a separate SVG file needs (prologue, metadata, namespaces, style); use the page's text colour."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    return svg.replace(INK, "currentColor")


def tidy(axes: Axes, x: str, y: str, title: str = "") -> None:
    """Set scales ("linear" or "log"), ticks in plain numbers (k, M, G on the x axis), a light grid and a left title."""
    axes.set(xscale=x, yscale=y)
    for axis, scale, (low, high) in ((axes.xaxis, x, axes.get_xlim()), (axes.yaxis, y, axes.get_ylim())):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,), numticks=8))
            axis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="#8a93a5", alpha=0.25, linewidth=0.6)
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
