from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from multistage_diffusion.reporting.captions import GROUND, SIZES, STRIP, draw_caption, fitted


@pytest.mark.parametrize("text", ["cats", "T-shirt/top", "a class with a very long name", "", "кошки", "é\u202e"])
@pytest.mark.parametrize("width", [8, 28, 64])
def test_a_caption_stays_inside_its_strip(text: str, width: int) -> None:
    picture = Image.new("RGB", (100, 60), (1, 2, 3))
    draw_caption(picture, (20, 30), width, text)
    pixels = np.asarray(picture).copy()
    inside = pixels[30 : 30 + STRIP, 20 : 20 + width]
    assert tuple(inside[0, 0]) == (GROUND,) * 3
    inside[:] = (1, 2, 3)
    assert (pixels == (1, 2, 3)).all()


def test_a_long_text_gets_a_smaller_font_and_then_an_ellipsis() -> None:
    assert [fitted(text, 60)[1].size for text in ("cats", "a class with a long name")] == [SIZES[0], SIZES[-1]]
    line, font = fitted("a class with a long name", 60)
    assert line.endswith("…")
    assert "a class with a long name".startswith(line[:-1])
    assert font.getlength(line) <= 60 < font.getlength("a class with a long name"[: len(line)] + "…")
    assert fitted("T-shirt/top", 60)[0] == "T-shirt/top"
