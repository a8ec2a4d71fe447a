import re
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from PIL import Image

from multistage_diffusion.reporting.html import COLOURS, chart, colour, escape, facts, note, page, picture, table, tidy


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
    pieces += [page(bad, "", [("s", bad, "")]), chart(draw, 1.0, bad)]
    for piece in pieces:
        assert bad not in piece
        assert safe in piece


def test_table_keeps_cells_in_place_and_sets_words_apart() -> None:
    source = table(["a", "b"], [[1, "two"], [3, "four"]], words=1)
    assert texts(source) == ["a", "b", "1", "two", "3", "four"]
    assert re.findall(r'<t[hd] class="words">(\w+)', source) == ["b", "two", "four"]


def test_chart_follows_the_theme_and_names_no_address() -> None:
    source = chart(draw, 2.0, "caption")
    assert "://" not in source
    assert "currentColor" in source
    assert "#010203" not in source
    assert "#123456" in source
    assert not re.search("<(style|metadata|!DOCTYPE|\\?xml)", source)
    assert {"Stage 1", "a < b", "caption", "1k", "100k", "0.1", "1"} <= set(texts(source))


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


def test_colours_differ_and_go_round() -> None:
    assert len({colour(k) for k in range(len(COLOURS))}) == len(COLOURS)
    assert colour(len(COLOURS)) == colour(0)
