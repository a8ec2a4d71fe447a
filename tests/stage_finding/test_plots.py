import dataclasses

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits

from multistage_diffusion import palette
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.stage_finding.edge_preview import decode_png
from multistage_diffusion.stage_finding.plots import _on_clear_ground, draw_stages, plot_stages, stages_height

IMAGES = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:300, None]


def colour_columns(path, colour) -> np.ndarray:
    """Return the share of each column's pixels that have a colour."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return (np.abs(pixels - np.array(colour)).max(-1) < 12).mean(0)


def test_curves_with_edges_at_their_times(tmp_path):
    result = compute_stages(IMAGES, StageSettings(samples=1000), schedule=VE())
    plot_stages(result, tmp_path / "plot.png")
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
    first_band = np.flatnonzero(colour_columns(tmp_path / "plot.png", band(0)) > 0.2)
    last_band = np.flatnonzero(colour_columns(tmp_path / "plot.png", band(2)) > 0.2)
    domain = last_band[-1] - first_band[0]
    t1, t2 = (float(result.time_measure.time(sigma)) for sigma in result.edges_sigma)
    assert (first_band[-1] - first_band[0]) / domain == pytest.approx(t1, abs=0.01)
    assert (last_band[0] - first_band[0]) / domain == pytest.approx(t2, abs=0.01)


def band(stage: int) -> tuple[float, ...]:
    return tuple(255 * part for part in to_rgb(palette.tint(palette.stage_colour(stage), palette.BAND)))


@pytest.mark.parametrize("stages", [1, 3])
def test_matrix_with_a_block_for_every_stage(tmp_path, stages):
    result = compute_stages(IMAGES, StageSettings(algorithm=2, stages=stages, samples=100))
    plot_stages(dataclasses.replace(result, strip=""), tmp_path / "plot.png")
    for stage in range(stages):
        colour = [255 * part for part in to_rgb(palette.stage_colour(stage))]
        columns = colour_columns(tmp_path / "plot.png", colour)
        assert (np.diff((columns > 0.5 * columns.max()).astype(int)) == 1).sum() == 2  # its left and its right side


@pytest.mark.parametrize("algorithm", [1, pytest.param(2, marks=pytest.mark.slow), "snr"])
def test_sigma_stands_above_the_time_and_the_title_is_a_sentence(algorithm):
    settings = (
        StageSettings(algorithm=algorithm) if algorithm == "snr" else StageSettings(algorithm=algorithm, samples=100)
    )
    result = compute_stages(IMAGES, settings)
    figure = Figure(figsize=(8, stages_height(result, 8)))
    draw_stages(figure, result)
    figure.draw_without_rendering()
    axes = next(a for f in (figure, *figure.subfigs) for a in f.axes if a.child_axes)
    above = axes.child_axes[0]
    assert above.get_xlabel() == "σ"
    ticks = [(float(text.get_text()), t) for t, text in zip(above.get_xticks(), above.get_xticklabels(), strict=True)]
    assert len(ticks) >= 5
    for sigma, t in ticks:
        assert float(result.time_measure.time(sigma)) == pytest.approx(t)
    words = axes.get_title().replace("\n", " ")
    assert all(f"{sigma:.3g}" in words for sigma in result.edges_sigma)
    assert "stages" in words


def test_a_narrow_plot_has_its_panels_one_above_the_other():
    result = compute_stages(IMAGES, StageSettings(algorithm=2, stages=3, samples=100))
    places = {}
    for width in (10.4, 3.8):
        figure = Figure(figsize=(width, stages_height(result, width)))
        draw_stages(figure, result)
        figure.draw_without_rendering()
        matrix, choice = figure.subfigs[0].axes[:2]
        places[width] = [axes.get_position() for axes in (matrix, choice)]
    assert places[10.4][0].x1 < places[10.4][1].x0
    assert places[3.8][0].y0 > places[3.8][1].y1


def test_gaps_of_the_strip_are_clear():
    result = compute_stages(IMAGES, StageSettings(samples=100))
    strip = decode_png(result.strip)
    pixels = _on_clear_ground(strip, 8)
    assert np.array_equal(pixels[..., 0], strip)
    assert (pixels[..., 3] == 255).sum() == 3 * 8 * 8 * 8
    assert (strip[pixels[..., 3] == 0] == 255).all()


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


@pytest.mark.parametrize("algorithm", ["timestep", "snr"])
def test_a_baseline_s_curve_is_the_log_snr_in_which_one_sees_its_edges(algorithm):
    result = compute_stages(IMAGES, StageSettings(algorithm=algorithm, stages=3))
    figure = Figure(figsize=(8, stages_height(result, 8)))
    draw_stages(figure, result)
    axes = next(a for f in (figure, *figure.subfigs) for a in f.axes if a.get_xlabel())
    t, shown = next(line.get_data() for line in axes.lines if len(line.get_xdata()) > 2)
    assert np.allclose(result.time_measure.time(torch.from_numpy(np.exp(-shown / 2))), t)
    assert axes.get_ylabel() == "log-SNR"


def test_edges_of_the_gaussian_denoiser_are_named_as_their_axes():
    result = compute_stages(IMAGES, StageSettings(algorithm=2, denoiser="gaussian", stages=3))
    figure = Figure(figsize=(10.4, stages_height(result, 10.4)))
    draw_stages(figure, result)
    words = [text.get_text() for f in (figure, *figure.subfigs) for a in f.axes for text in a.texts]
    assert not [text for text in words if "t =" in text]
    for sigma in result.edges_sigma:
        assert any(f"log-SNR = {-2 * np.log(sigma):.3g}   σ = {sigma:.4g}" in text for text in words)
