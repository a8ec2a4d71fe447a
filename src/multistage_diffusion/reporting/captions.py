"""Captions below the images of a grid."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from ..escaping import shown

STRIP = 15  # height of a caption in pixels
SIZES = (11, 10, 9)  # of the font in pixels: the largest with which the whole text fits
INK, GROUND = 240, 40  # greys of the text and of the strip below an image


def draw_caption(picture: Image.Image, corner: tuple[int, int], width: int, text: str) -> None:
    """Draw a text in the middle of a dark strip of STRIP pixels, shortened with an ellipsis if it is too long.

    Args:
        picture: mode "L" or "RGB"; changed in place.
        corner: (left, top) of the strip in pixels.
        width: of the strip in pixels.
        text: one line; invisible characters are escaped.
    """
    draw, (left, top) = ImageDraw.Draw(picture), corner
    colours = [INK, GROUND] if picture.mode == "L" else [(INK,) * 3, (GROUND,) * 3]
    draw.rectangle((left, top, left + width - 1, top + STRIP - 1), fill=colours[1])
    line, font = fitted(shown(text), width - 4)
    draw.text((left + width / 2, top + STRIP / 2), line, fill=colours[0], font=font, anchor="mm")


def fitted(text: str, width: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return a text and the font with which it is at most `width` pixels wide; shortened if SIZES do not suffice."""
    for size in SIZES:
        if _font(size).getlength(text) <= width:
            return text, _font(size)
    font = _font(SIZES[-1])
    lengths = (n for n in range(len(text), 0, -1) if font.getlength(text[:n] + "…") <= width)
    return text[: next(lengths, 0)] + "…", font


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib  # its font has the letters of many scripts

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
