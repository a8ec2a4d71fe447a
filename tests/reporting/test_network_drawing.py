from __future__ import annotations

import io
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from multistage_diffusion.cli import main
from multistage_diffusion.config import NetworkConfig, RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.palette import STAGE_COLOURS
from multistage_diffusion.reporting.describe import describe
from multistage_diffusion.reporting.network_drawing import _draw_key, draw_network
from multistage_diffusion.reporting.network_layout import network_layout

SVG = "{http://www.w3.org/2000/svg}"


def digits(**changes: Any) -> RunConfig:
    return override(preset("digits"), {key.replace("__", "."): value for key, value in changes.items()})


CONFIGS = {
    "shared": digits(),
    "one stage": digits(
        name=r"<&> $\x$",
        diffusion__schedule__kind="edm",
        network__decoder_widths=[32],
        stages__interior=[],
        training__shares="uniform",
    ),
    "five stages": digits(
        network__decoder_widths=[64, 48, 32, 16, 8], stages__interior=[0.1, 0.4, 2.0, 9.0], training__shares="uniform"
    ),
    "separate": digits(network__family="meme", network__separate=True, network__attention_shares=[0.125, 0.5, 0.875]),
}


@pytest.fixture(scope="module")
def drawn() -> dict[str, tuple[dict[str, Any], ET.Element]]:
    """Descriptions and SVG trees."""
    described = {name: describe(config) for name, config in CONFIGS.items()}
    return {n: (d, ET.fromstring(draw_network(CONFIGS[n].network, d, "svg"))) for n, d in described.items()}


def texts(tree: ET.Element) -> list[str]:
    return [("".join(element.itertext())).strip() for element in tree.iter(f"{SVG}text")]


@pytest.mark.parametrize("name", CONFIGS)
def test_every_stage_is_named_with_its_noise_and_widths(name: str, drawn: Any) -> None:
    (described, tree), config = drawn[name], CONFIGS[name]
    found = texts(tree)
    for k, stage in enumerate(described["stages"]):
        low, high = stage["sigma"]
        assert f"Stage {k + 1}" in found
        assert f"σ in [{low:.3g}, {'∞' if high is None else format(high, '.3g')})" in found
        assert f"{stage['calls']} of 20 calls" in found
        width = stage["decoder_width"]
        assert str(width) in found or f"{width} ◆" in found
        assert any(text.startswith(f"t in [{stage['t'][0]:.3g}, ") for text in found) == (name != "one stage")
    assert ("Shared encoder" in found) == (len(described["stages"]) > 1 and not config.network.separate)
    assert described["name"] in found


@pytest.mark.parametrize("name", CONFIGS)
def test_shares_add_up(name: str, drawn: Any) -> None:
    shares = [int(text.removesuffix(" %")) for text in texts(drawn[name][1]) if text.endswith(" %") and "<" not in text]
    small = sum(text == "< 1 %" for text in texts(drawn[name][1]))
    assert 200 - 6 - small <= sum(shares) <= 200 + 6


def test_shares_are_those_of_parameters_and_of_all_calls(drawn: Any) -> None:
    described, tree = drawn["shared"]
    found = texts(tree)
    first, shared = described["stages"][0], described["shared_multiply_adds"]
    whole = sum(s["calls"] * s["multiply_adds"] for s in described["stages"])
    own = first["parameters"] - described["shared_parameters"]
    assert f"{100 * own / described['parameters']:.0f} %" in found
    assert f"{100 * first['calls'] * (first['multiply_adds'] - shared) / whole:.0f} %" in found
    assert f"{100 * 20 * shared / whole:.0f} %" in found


def test_totals_are_in_the_title(drawn: Any) -> None:
    found = " ".join(texts(drawn["shared"][1])[:40])
    assert "DDPM++ for images of 1 × 8 × 8, 720 k parameters, 8.81 M multiply-adds a call" in found
    assert "(mean over 20 calls of dpm, singlestep, order 3, log-snr spacing; 6.2 M if stages count" in found


def test_the_scale_is_stated_and_true(drawn: Any) -> None:
    layout = network_layout(CONFIGS["shared"].network, 8, 8)
    (scale,) = [text for text in texts(drawn["shared"][1]) if text.startswith("scale: ")]
    assert scale == "scale: 16 channels wide, 1 pixel high"
    assert has_box(drawn["shared"][1], 16 * layout.channel, layout.pixel)


def test_a_legend_of_tokens_names_them_and_stays_clear_of_its_box() -> None:
    shape = {"decoder_depths": (2, 3, 1), "head_channels": 8, "size": (8, 8), "separate": True}
    network = NetworkConfig.of(
        "dit", channels=1, encoder_width=64, decoder_widths=(64, 96, 32), encoder_depth=2, **shape
    )
    layout = network_layout(network, 8, 8)
    axes = Figure().subplots()
    _draw_key(axes, layout, 20)
    (scale, height), *others = [(text.get_text(), text.get_position()[1]) for text in axes.texts]
    assert scale == "scale: 32 channels wide, 1 token high"
    below = [y for _, y in others if y < height]
    assert below
    assert all(height - y >= layout.pixel / 2 + 0.1 for y in below)


@pytest.mark.parametrize("name", CONFIGS)
def test_drawn_boxes_are_as_large_as_laid_out(name: str, drawn: Any) -> None:
    for group in network_layout(CONFIGS[name].network, 8, 8).groups:
        for block in (block for column in group for block in column.blocks):
            assert has_box(drawn[name][1], block.width, block.height)


def has_box(tree: ET.Element, width: float, height: float) -> bool:
    """Whether a path of this width and height, in inches, is drawn (a picture's point is 1/72 inch)."""
    for path in tree.iter(f"{SVG}path"):
        points = np.array(re.findall(r"-?[\d.]+", path.get("d", "")), float).reshape(-1, 2)
        if len(points) and np.allclose(np.ptp(points, axis=0), (72 * width, 72 * height), atol=0.01):
            return True
    return False


def test_attention_is_marked_where_it_is(drawn: Any) -> None:
    found = texts(drawn["shared"][1])
    assert found.count("32 ◆") == 6  # the encoder's and two decoders' second level, three middles
    assert "64 ◆" in found
    assert "16 ◆" not in found
    assert "attention: 12.5 % of channels" in texts(drawn["separate"][1])


def test_each_stage_has_a_colour_of_its_own(drawn: Any) -> None:
    source = ET.tostring(drawn["five stages"][1], encoding="unicode").lower()
    assert all(colour.lower() in source for colour in STAGE_COLOURS[:5])
    assert STAGE_COLOURS[5].lower() not in source


def test_a_png_is_as_large_as_the_layout_and_not_blank() -> None:
    config = CONFIGS["shared"]
    image = Image.open(io.BytesIO(draw_network(config.network, describe(config), "png"))).convert("RGB")
    layout = network_layout(config.network, 8, 8)
    assert image.size == pytest.approx((layout.width * 150, layout.height * 150), abs=1)
    pixels = np.asarray(image).reshape(-1, 3)
    white = (pixels == 255).all(axis=1).mean()
    assert 0.5 < white < 0.95
    assert (np.asarray(image)[[0, -1]] == 255).all()


def test_drawing_is_deterministic_and_leaves_no_trace(drawn: Any) -> None:
    described, config = drawn["shared"][0], CONFIGS["shared"]
    before = dict(mpl.rcParams)
    one, two = (draw_network(config.network, described, "svg") for _ in range(2))
    assert one == two
    assert b"<dc:date>" not in one
    assert dict(mpl.rcParams) == before


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_describe_draws_and_prints(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / f"net.{suffix}"
    assert main(["describe", "digits", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("digits: ddpmpp")
    assert printed.endswith(f"written: {out}\n")
    first = out.read_bytes()
    assert first.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    assert main(["describe", "digits", "--out", str(out), "--json"]) == 2
    assert "exists; choose another name or give --overwrite" in capsys.readouterr().err
    assert main(["describe", "digits", "--out", str(out), "--json", "--overwrite", "--calls", "9"]) == 0
    assert json.loads(capsys.readouterr().out)["sampler"]["calls"] == 9
    assert out.read_bytes() != first


def test_other_files_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "nothing-there", "--out", str(tmp_path / "net.pdf")]) == 2
    assert "net.pdf: must end in .png or .svg" in capsys.readouterr().err
    assert main(["describe", "nothing-there", "--out", str(tmp_path / "net.png")]) == 2
    assert list(tmp_path.iterdir()) == []
