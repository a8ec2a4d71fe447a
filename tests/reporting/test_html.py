import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from PIL import Image

from multistage_diffusion.palette import STAGE_COLOURS, tint
from multistage_diffusion.reporting.html import (
    NARROW,
    WIDE,
    bar,
    chart,
    drawing,
    escape,
    facts,
    inline,
    note,
    page,
    picture,
    table,
    tidy,
)


def draw(figure: Figure) -> None:
    axes = figure.subplots()
    axes.plot([1e3, 1e6], [0.02, 2.0], color="#123456", label="a < b")
    axes.legend()
    tidy(axes, "log", "log", "Stage 1")


def texts(source: str) -> list[str]:
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = lambda data: found.append(data)  # type: ignore[method-assign]
    parser.feed(source)
    return [t.strip() for t in found if t.strip()]


def test_everything_written_by_a_user_is_escaped() -> None:
    bad = "<b onclick='x'>&\""
    safe = escape(bad)
    assert safe == "&lt;b onclick=&#x27;x&#x27;&gt;&amp;&quot;"
    pieces = [facts({bad: bad}), table([bad], [[bad]]), note(bad), picture(Image.new("L", (1, 1)), bad)]
    pieces += [page(bad, "", [("s", bad, "")]), chart(draw, 1.0, bad), bar(bad, [1.0]), drawing("<svg></svg>", bad)]
    for piece in pieces:
        assert bad not in piece
        assert safe in piece


def test_table_keeps_cells_in_place_and_sets_words_apart() -> None:
    source = table(["a", "b"], [[1, "two"], [3, "four"]], words=1)
    assert texts(source) == ["a", "b", "1", "two", "3", "four"]
    assert re.findall(r'<t[hd][^>]*class="words">(\w+)', source) == ["b", "two", "four"]
    assert re.findall(r'<th scope="(\w+)"[^>]*>(\w+)', source) == [
        ("col", "a"),
        ("col", "b"),
        ("row", "1"),
        ("row", "3"),
    ]


def test_chart_follows_the_theme_and_names_no_address() -> None:
    source = chart(draw, 2.0, "caption")
    assert "://" not in source
    assert "currentColor" in source
    assert "#1d2330" not in source
    assert "#123456" in source
    assert not re.search("<(style|metadata|!DOCTYPE|\\?xml)", source)
    assert {"Stage 1", "a < b", "caption", "1k", "100k", "0.1", "1"} <= set(texts(source))


def test_a_chart_is_in_the_page_for_wide_and_for_narrow_screens() -> None:
    widths = []

    def noted(figure: Figure) -> None:
        widths.append(figure.get_figwidth())
        draw(figure)

    source = chart(noted, 2.0, "caption", 5.0)
    assert sorted(widths) == [NARROW, WIDE]
    found = re.findall(
        r'<svg class="(\w+)" role="img" aria-label="caption"[^>]*viewBox="0 0 ([\d.]+) ([\d.]+)"', source
    )
    assert found == [("wide", f"{72 * WIDE:g}", "144"), ("narrow", f"{72 * NARROW:g}", "360")]
    assert source.count("<title>caption</title>") == 2
    names = re.findall(r' id="([^"]+)"', source)
    assert len(names) == len(set(names)) > 0  # the two do not share clipping paths
    assert all(f"#{name}" in source for name in names)


def test_colours_of_a_picture_become_those_of_the_page() -> None:
    blue = STAGE_COLOURS[0]
    svg = (
        f'<?xml?><svg><path id="unused" style="fill: {tint(blue)}; stroke: {blue}"/><rect style="fill: #ffffff"/></svg>'
    )
    assert inline(svg, "t") == (
        '<svg class="" role="img" aria-label="t"><title>t</title><path style="fill: color-mix(in srgb, var(--s1) 30%, '
        'var(--card)); stroke: var(--s1)"/><rect style="fill: var(--card)"/></svg>'
    )


def test_a_bar_says_what_it_measures_and_its_parts_are_the_shares() -> None:
    source = bar("Share of rows", [0.25, 0.75])
    assert texts(source) == ["Share of rows", "1", "25%", "2", "75%"]
    assert re.findall(r"flex:([\d.]+);--c:(#\w+);--e:var\(--s(\d)\)", source) == [
        ("0.250000", STAGE_COLOURS[0], "1"),
        ("0.750000", STAGE_COLOURS[1], "2"),
    ]


def test_charts_are_the_same_every_time() -> None:
    assert chart(draw, 2.0, "caption") == chart(draw, 2.0, "caption")


@pytest.mark.parametrize("low", [0.86, 0.3, 0.01, 1e-7])
def test_log_ticks_are_few_and_plain(low: float) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1, 10], [low, 0.9])
    tidy(axes, "linear", "log")
    figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    shown = [t.get_text() for t in axes.get_yticklabels() if bottom <= t.get_position()[1] <= top]
    assert 2 <= len(shown) <= 9
    assert all("$" not in label for label in shown)
