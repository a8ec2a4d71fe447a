from __future__ import annotations

import pytest

from multistage_diffusion.escaping import counted, shown


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("plain", "plain"),
        ("Zürich ☃ 猫 5\u00a0%", "Zürich ☃ 猫 5\u00a0%"),
        ("\x1b[31mred\x07", r"\x1b[31mred\x07"),
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),
        ("\u2066a\u2069\u200b", r"\u2066a\u2069\u200b"),
        ("a\nb\tc\r", r"a\nb\tc\r"),
        ("\x9b2J\x85", r"\x9b2J\x85"),
        ("\udcff", r"\udcff"),
        ("\u2028", r"\u2028"),
        ("\U000e0041", r"\U000e0041"),
        (3, "3"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: object, wanted: str) -> None:
    assert shown(text) == wanted


@pytest.mark.parametrize(
    ("count", "noun", "wanted"),
    [(1, "image", "1 image"), (0, "image", "0 images"), (1, "class", "1 class"), (2, "class", "2 classes")],
)
def test_a_count_agrees_with_its_noun(count: int, noun: str, wanted: str) -> None:
    assert counted(count, noun) == wanted


def test_lines_stay_lines_where_wanted() -> None:
    assert shown("a\n\tb\x1b", lines=True) == "a\n\tb\\x1b"
