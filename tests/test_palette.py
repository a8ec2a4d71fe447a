"""The colours are told apart by everybody: contrasts of WCAG 2, and colour vision as Machado et al. (2009) model it."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from multistage_diffusion import palette
from multistage_diffusion.palette import ON_DARK, SHARED, SHARED_ON_DARK, STAGE_COLOURS, contrast, tint

VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour: str, vision: str) -> np.ndarray:
    """Return CIE L*a*b* of a colour as somebody with this colour vision sees it."""
    c = np.array(to_rgb(colour))
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(VISION[vision]) @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    x, y, z = np.cbrt(np.array(to_xyz) @ linear / (0.95047, 1.0, 1.08883))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == contrast("#ffffff", "#777777") == pytest.approx(4.478, abs=1e-3)
    assert contrast("#0072b2", "#0072b2") == 1


@pytest.mark.parametrize("colour", [*STAGE_COLOURS, SHARED])
def test_white_text_stands_out_on_each_colour(colour: str) -> None:
    assert contrast(colour, "#ffffff") >= 4.5


@pytest.mark.parametrize("colour", [*ON_DARK, SHARED_ON_DARK, palette.SOFT_ON_DARK, palette.INK_ON_DARK])
def test_text_stands_out_on_the_dark_page(colour: str) -> None:
    assert contrast(colour, palette.CARD_ON_DARK) >= 4.5
    assert contrast(colour, palette.PAGE_ON_DARK) >= 4.5


@pytest.mark.parametrize("ink", [palette.INK, palette.SOFT])
def test_text_stands_out_on_the_light_page(ink: str) -> None:
    assert min(contrast(ink, palette.PAGE), contrast(ink, palette.CARD)) >= 4.5


@pytest.mark.parametrize("colour", [*STAGE_COLOURS, SHARED])
def test_dark_text_stands_out_on_a_tint(colour: str) -> None:
    assert contrast(palette.INK, tint(colour)) >= 4.5
    assert contrast(palette.SOFT, tint(colour, palette.BAND)) >= 4.5


@pytest.mark.parametrize("vision", VISION)
def test_stages_are_told_apart_with_any_colour_vision(vision: str) -> None:
    for one, other in itertools.combinations(STAGE_COLOURS, 2):
        assert np.linalg.norm(lab(one, vision) - lab(other, vision)) >= 18, (one, other)


def test_a_stage_has_the_hue_of_its_colour_on_both_pages() -> None:
    for light, dark in zip(STAGE_COLOURS, ON_DARK, strict=True):
        (a, b), (c, d) = lab(light, "normal")[1:], lab(dark, "normal")[1:]
        turn = np.degrees(np.arctan2(b, a) - np.arctan2(d, c))
        assert abs((turn + 180) % 360 - 180) < 30, (light, dark)


def test_every_colour_of_a_picture_is_a_variable_of_both_pages() -> None:
    used = {name for value in palette.css().values() for name in re.findall(r"var\((--\w+)\)", value)}
    for dark in (False, True):
        assert used <= set(re.findall(r"--\w+", palette.variables(dark=dark)))
    assert len(palette.css()) == 4 + 3 * (len(STAGE_COLOURS) + 1)


def test_colours_go_round() -> None:
    assert palette.stage_colour(len(STAGE_COLOURS)) == palette.stage_colour(0) == STAGE_COLOURS[0]


def test_the_width_is_that_of_the_whole_figure() -> None:
    figure = Figure(figsize=(5, 3))
    parts = figure.subfigures(1, 2)
    assert palette.figure_width(parts[0].add_subplot()) == 5
    assert palette.figure_width(Figure(figsize=(4, 3)).add_subplot()) == 4
