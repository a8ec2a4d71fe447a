import dataclasses

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.stage_finding.plots import plot_stages

IMAGES = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:300, None]


def colour_columns(path, colour) -> np.ndarray:
    """Return the share of each column's pixels that have a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (np.abs(pixels - np.array(colour)).max(-1) < 12).mean(0)


def test_curves_with_edges_at_their_times(tmp_path):
    result = compute_stages(IMAGES, StageSettings(samples=1000), schedule=VE())
    plot_stages(result, tmp_path / "plot.png")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
    first_band = np.flatnonzero(colour_columns(tmp_path / "plot.png", (0xE8, 0xF1, 0xF8)) > 0.2)
    last_band = np.flatnonzero(colour_columns(tmp_path / "plot.png", (0xFB, 0xED, 0xE3)) > 0.2)
    domain = last_band[-1] - first_band[0]
    t1, t2 = (float(result.time_measure.time(sigma)) for sigma in result.edges_sigma)
    assert (first_band[-1] - first_band[0]) / domain == pytest.approx(t1, abs=0.01)
    assert (last_band[0] - first_band[0]) / domain == pytest.approx(t2, abs=0.01)


@pytest.mark.parametrize("stages", [1, 3])
def test_matrix_with_a_block_for_every_stage(tmp_path, stages):
    result = compute_stages(IMAGES, StageSettings(algorithm=2, stages=stages, samples=100))
    plot_stages(dataclasses.replace(result, strip=""), tmp_path / "plot.png")
    vertical = colour_columns(tmp_path / "plot.png", (0xD5, 0x5E, 0x00)) > 0.75 / (stages + 1)
    lines = np.flatnonzero(np.diff(vertical.astype(int)) == 1)
    assert len(lines) == stages + 1


@pytest.mark.parametrize("algorithm", [1, 2])
def test_the_strip_stands_below(tmp_path, algorithm):
    result = compute_stages(IMAGES, StageSettings(algorithm=algorithm, samples=100))
    plot_stages(result, tmp_path / "with.png")
    plot_stages(dataclasses.replace(result, strip=""), tmp_path / "without.png")
    both, upper = (Image.open(tmp_path / name) for name in ("with.png", "without.png"))
    assert both.width == upper.width
    assert both.height > upper.height + 200
    lower = np.asarray(both.convert("L"))[upper.height :]
    assert (lower < 100).mean() > 0.1  # pictures, not paper
