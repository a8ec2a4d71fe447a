"""Text for terminals and pages: foreign text without invisible characters, counts with their noun."""

from __future__ import annotations

import unicodedata

_HIDDEN = {
    "Cc",
    "Cf",
    "Cs",
    "Co",
    "Cn",
    "Zl",
    "Zp",
}  # control, format (bidi), surrogate, private, unassigned, separators


def shown(text: object, *, lines: bool = False) -> str:
    r"""Return str(text) with every invisible character written as an escape, e.g. \x1b or \u202e.

    File names, class names and messages of other programs may hold characters that colour, move or reorder what a
    terminal or a browser shows.

    Args:
        text: any object.
        lines: keep newlines and tabs.
    """
    found = str(text)
    if found.isprintable():
        return found
    return "".join(
        _escaped(c) if unicodedata.category(c) in _HIDDEN and not (lines and c in "\n\t") else c for c in found
    )


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, e.g. "1 image", "3 classes"."""
    plural = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else plural}"
