"""Plots of the found stages.

The first axis shows the time (or log-SNR) in which stages were found, a second one sigma. A stage has the colour that it
has in all pictures.
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from .. import files
from ..escaping import counted
from ..palette import BAND, INK, SHARED, SOFT, WHITE, figure_width, stage_colour, tint
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from .edge_preview import GAP, ROWS, SIDE, decode_png
from .finding import NoMiddleStageError
from .result import StageResult
from .settings import StageSettings

_CLEAN, _NOISE = stage_colour(0), stage_colour(2)  # of the curves that tell the first and the last of three stages
_NARROW = 6.0  # inches: below this width, two panels stand one above the other
_TICKS = tuple(m * 10.0**e for e in range(-4, 5) for m in (1, 3))  # of sigma


def plot_stages(result: StageResult, path: Path | str) -> None:
    """Write a PNG of the edges and the data from which they were computed; see `draw_stages`."""
    width = 8.0 if _one_panel(result) else 10.4
    figure = Figure(figsize=(width, stages_height(result, width)))
    FigureCanvasAgg(figure)
    draw_stages(figure, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    files.write_atomic(Path(path), buffer.getvalue())


def _one_panel(result: StageResult) -> bool:
    return result.settings.algorithm in (1, "timestep", "snr")


def _heights(result: StageResult, width: float) -> tuple[float, float]:
    """Return the heights of the plot and of the strip below it, in inches."""
    strip = None if not result.strip else decode_png(result.strip)
    above = 0.7 if width > _NARROW else 1.3  # titles of the strip
    below = 0.0 if strip is None else (width - 1.0) * strip.shape[0] / strip.shape[1] + above
    if _one_panel(result):
        return 4.8, below
    return 5.6 if width > _NARROW else 7.8, below


def stages_height(result: StageResult, width: float) -> float:
    """Return the height that `draw_stages` needs for a figure of this width, in inches."""
    return sum(_heights(result, width))


def draw_stages(figure: Figure, result: StageResult) -> None:
    """Draw the edges and the data from which they were computed into an empty figure.

    Algorithm 1: S0 and S1 over t with 95 % bands, alpha, and the edges with their intervals. Algorithm 2: the
    similarity matrix with the stages as blocks, and the distance within stages for 1 to 8 stages. "gradient": the same
    with the cosines of gradients. Denoiser "gaussian": distances of the network's outputs over the quantiles of the training
    density, and the same choice. The other baselines: their values over t. The lower part shows the optimal denoiser's
    outputs for some images on both sides of every edge. The axes show the time in which averages are uniform. Edges are
    labelled in the result's own kernel and in sigma.
    """
    figure.set_layout_engine("constrained")
    upper: Figure | SubFigure = figure
    if result.strip:
        heights = _heights(result, figure.get_figwidth())
        halves = figure.subfigures(2, 1, height_ratios=heights, squeeze=False)[:, 0]
        upper = halves[0]
        _draw_strip(halves[1].add_subplot(), result, decode_png(result.strip))
    if _one_panel(result):
        axes = upper.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        (_draw_curves if result.settings.algorithm == 1 else _draw_values)(axes, result)
    else:
        wide = figure.get_figwidth() > _NARROW
        axes, choice = (
            upper.subplots(1, 2, width_ratios=(1.6, 1)) if wide else upper.subplots(2, 1, height_ratios=(1.7, 1))
        )
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        (_draw_matrix if result.diffusion is None else _draw_distances)(axes, result)
        choice.spines[["top", "right"]].set_visible(False)
        _draw_choice(choice, result)


def plot_overlap(error: NoMiddleStageError, path: Path | str) -> None:
    """Write a PNG of the curves whose outer stages overlap."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    _draw_similarities(axes, error.curves, error.settings)
    axes.set(ylim=(0, 1.05))
    _title(axes, "The outer stages overlap: no middle stage", _rule(error.settings))
    _sigma_axis(axes, VP())
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    files.write_atomic(Path(path), buffer.getvalue())


def _cuts(result: StageResult) -> list[float]:
    """Return the edges in the time of the curves."""
    return [float(result.time_measure.time(sigma)) for sigma in result.edges_sigma]


def _edge_labels(result: StageResult, separator: str) -> list[str]:
    """Return "t = ..., σ = ..." of every edge, with the kernel's name if it differs from the kernel of the axes.

    Of results whose axes are log-SNR (denoiser "gaussian"): "log-SNR = ..., σ = ...".
    """
    if result.diffusion is not None:
        return [f"log-SNR = {-2 * math.log(sigma):.3g}{separator}σ = {sigma:.4g}" for sigma in result.edges_sigma]
    kernel = "" if result.schedule == result.time_measure else f" ({result.schedule.kind})"
    edges = zip(result.edges_t, result.edges_sigma, strict=True)
    return [f"t = {t:.4g}{kernel}{separator}σ = {sigma:.4g}" for t, sigma in edges]


def _wide(axes: Axes) -> bool:
    return figure_width(axes) > _NARROW


def _title(axes: Axes, words: str, details: str) -> None:
    if not _wide(axes):
        words, details = (textwrap.fill(text, 38) for text in (words, details))
    axes.set_title(f"{words}\n{details}", fontsize=10 if _wide(axes) else 9)


def _rule(settings: StageSettings) -> str:
    return f"rule {settings.rule}, η = {settings.eta:.3g}"


def _at_sigmas(result: StageResult) -> str:
    """Return "σ = 0.3, 2 and 5" of the edges."""
    *first, last = [f"{sigma:.3g}" for sigma in result.edges_sigma] or [""]
    return f"σ = {', '.join(first)}{' and ' if first else ''}{last}"


def _in_words(result: StageResult, what: str) -> str:
    """Return what a plot shows as a sentence, e.g. "The optimal denoiser changes at σ = 0.3 and 2: 3 stages"."""
    if not result.edges_sigma:
        return f"{what}: 1 stage"
    return f"{what} at {_at_sigmas(result)}: {counted(len(result.edges_sigma) + 1, 'stage')}"


def _sigma_axis(axes: Axes, measure: NoiseSchedule, least: float = 0.045) -> None:
    """Add sigma above an x axis of a schedule's time; ticks stand at least this share of the axis apart."""
    low, high = axes.get_xlim()
    least *= 1 if _wide(axes) else 2
    ticks: list[tuple[float, str]] = []
    for sigma in _TICKS:
        t = float(measure.time(sigma))
        free = not ticks or t - ticks[-1][0] > least * (high - low)
        if low < t < high and measure.t_min < t < measure.t_max and free:
            ticks.append((t, f"{sigma:g}"))
    above = axes.secondary_xaxis("top")
    above.set_xticks([t for t, _ in ticks], [text for _, text in ticks], fontsize=8.5)
    above.set_xlabel("σ", fontsize=9)


def _data_label(result: StageResult) -> str:
    return "latents" if result.data_range is None else "data in [{:g}, {:g}]".format(*result.data_range)


def _draw_curves(axes: Axes, result: StageResult) -> None:
    """Draw S0, S1, alpha, the edges and the stages as bands."""
    settings, cuts = result.settings, _cuts(result)
    bounds = [result.time_measure.t_min, *cuts, result.time_measure.t_max]
    top, near = (1.26, 0.14) if _wide(axes) else (1.42, 0.5)
    for stage, (left, right) in enumerate(itertools.pairwise(bounds)):
        axes.axvspan(left, right, color=tint(stage_colour(stage), BAND), zorder=0, linewidth=0)
        name: Any = {"ha": "center", "color": stage_colour(stage), "fontweight": "bold"}
        axes.text((left + right) / 2, top - 0.07, f"stage {stage + 1}", fontsize=10 if _wide(axes) else 9, **name)
    aligned = ("right", "left") if cuts[1] - cuts[0] < near else ("center", "center")  # close labels would overlap
    for low, high in result.intervals_t if result.schedule == result.time_measure else ():
        axes.axvspan(low, high, ymax=1.03 / top, color=INK, alpha=0.15, linewidth=0, zorder=1)
    for cut, label, align in zip(cuts, _edge_labels(result, "\n"), aligned, strict=True):
        axes.plot((cut, cut), (0, 1.03), color=INK, linewidth=1.0, zorder=2)
        axes.text(cut, 1.05, label, ha=align, va="bottom", fontsize=8.5, color=INK)
    _draw_similarities(axes, result.curves, settings)
    axes.set(xlim=(0, result.time_measure.t_max), ylim=(0, top), yticks=np.arange(0, 1.01, 0.2))
    _title(axes, _in_words(result, "The optimal denoiser changes"), f"{_rule(settings)}, {_data_label(result)}")
    _sigma_axis(axes, result.time_measure)


def _draw_values(axes: Axes, result: StageResult) -> None:
    """Draw the values that a baseline groups, the edges and the stages as bands."""
    cuts = _cuts(result)
    bounds = [0.0, *cuts, result.time_measure.t_max]
    for stage, (left, right) in enumerate(itertools.pairwise(bounds)):
        axes.axvspan(left, right, color=tint(stage_colour(stage), BAND), zorder=0, linewidth=0)
        place: Any = {"ha": "center", "transform": axes.get_xaxis_transform(), "fontweight": "bold"}
        axes.text((left + right) / 2, 0.94, f"{stage + 1}", color=stage_colour(stage), **place)
    for cut, label in zip(cuts, _edge_labels(result, "\n"), strict=True):
        axes.axvline(cut, color=INK, linewidth=1.0)
        axes.text(
            cut, 0.02, label, rotation=90, va="bottom", ha="right", fontsize=8, transform=axes.get_xaxis_transform()
        )
    t = np.asarray(result.curves["t"])
    axes.plot(t, -2 * np.log(result.time_measure.sigma(torch.from_numpy(t)).numpy()), color=INK, linewidth=2)
    name = {"timestep": "t", "snr": "log-SNR"}[result.rule]
    axes.set(xlim=(0, result.time_measure.t_max), xlabel="t (VP)", ylabel="log-SNR")
    _title(axes, _in_words(result, f"Even in {name}, whatever the data: cut"), "the curve is the VP kernel's log-SNR")
    _sigma_axis(axes, result.time_measure)


def _draw_similarities(axes: Axes, curves: dict[str, Any], settings: StageSettings) -> None:
    """Draw S0, S1, alpha and, for rule "interval-mean", the means that cross alpha at the edges."""
    t, s0, s1 = (np.asarray(curves[name]) for name in ("t", "s0", "s1"))
    for mean, error, color in ((s0, "s0_error", _CLEAN), (s1, "s1_error", _NOISE)):
        band = 1.96 * np.asarray(curves[error])
        axes.fill_between(t, mean - band, mean + band, color=color, alpha=0.25, linewidth=0)
    axes.plot(t, s0, color=_CLEAN, linewidth=2, label="S₀: as at t → 0 (clean image)")
    axes.plot(t, s1, color=_NOISE, linewidth=2, linestyle=(0, (5, 1.5)), label="S₁: as at t → 1 (mean image)")
    if settings.rule == "interval-mean":
        count = np.arange(1, len(t) + 1)
        below, above = s0.cumsum() / count, (s1[::-1].cumsum() / count)[::-1]
        axes.plot(t, below, color=_CLEAN, linewidth=1, alpha=0.7, label="mean of S₀ below t")
        axes.plot(t, above, color=_NOISE, linewidth=1, alpha=0.7, linestyle=(0, (5, 1.5)), label="mean of S₁ from t on")
    axes.axhline(settings.alpha, color=SOFT, linewidth=1, linestyle=":", zorder=1, label=f"α = {settings.alpha:g}")
    axes.set(xlabel="t (VP)", ylabel="similarity of the optimal denoisers")
    below_by, columns = (-0.13, 3) if _wide(axes) else (-0.2, 1)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, below_by), ncols=columns)


def _colour_scale(axes: Axes, shown: ScalarMappable, label: str) -> None:
    """Add the scale of a matrix: at its right, or below it on narrow pages."""
    wide, figure = _wide(axes), axes.get_figure()
    assert figure is not None
    figure.colorbar(shown, ax=axes, shrink=0.9, label=label, location="right" if wide else "bottom")


def _draw_matrix(axes: Axes, result: StageResult) -> None:
    """Draw the similarity of all pairs of times (a cell extends from its time to the next) and the stages as blocks."""
    t = np.asarray(result.curves["t"])
    borders = np.append(t, 2 * t[-1] - t[-2])
    gradients = result.settings.algorithm == "gradient"
    lowest = min(0.0, float(np.min(result.curves["similarity"])))
    cells: Any = {"cmap": "cividis", "vmin": lowest, "vmax": 1, "rasterized": True}
    mesh = axes.pcolormesh(borders, borders, result.curves["similarity"], **cells)
    _colour_scale(axes, mesh, "mean cosine of gradients" if gradients else "mean similarity")
    ends = [float(borders[0]), *_cuts(result), float(borders[-1])]
    _draw_blocks(axes, ends)
    _label_edges(axes, result)
    axes.set(aspect="equal", xlabel="t (VP)", ylabel="t (VP)")
    settings = result.settings
    compared = "gradients of a trained run" if gradients else f"{settings.space} space"
    what = "Gradients change" if gradients else "The optimal denoiser changes"
    _title(axes, _in_words(result, what), f"{settings.objective}, {compared}, {_data_label(result)}")
    _sigma_axis(axes, result.time_measure, 0.08)


def _draw_distances(axes: Axes, result: StageResult) -> None:
    """Draw the distance of the network's outputs at all pairs of noise levels, and the stages as blocks.

    The axes are even in the share of training noise, and labelled with log-SNR and sigma.
    """
    sigma, distance = np.asarray(result.curves["sigma"]), np.asarray(result.curves["distance"])
    share = (np.arange(len(sigma)) + 0.5) / len(sigma)
    shown = axes.imshow(np.sqrt(distance), cmap="cividis_r", vmin=0, origin="lower", extent=(0.0, 1.0, 0.0, 1.0))
    _colour_scale(axes, shown, "rms distance of the network's outputs")
    cuts = np.interp(np.log(result.edges_sigma), np.log(sigma), share).tolist()
    _draw_blocks(axes, [0.0, *cuts, 1.0])
    ticks = np.interp((0.05, 0.25, 0.5, 0.75, 0.95), share, np.log(sigma))
    places, labels = (0.05, 0.25, 0.5, 0.75, 0.95), [f"{-2 * value:.2g}" for value in ticks]
    axes.set(aspect="equal", xlabel="log-SNR, at even shares of the training noise", ylabel="log-SNR")
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    above = axes.secondary_xaxis("top")
    above.set_xticks(places, [f"{value:.2g}" for value in np.exp(ticks)])
    above.set_xlabel("σ", fontsize=9)
    _label_edges(axes, result)
    _title(axes, _in_words(result, "The network's task changes"), f"Wiener denoiser, {_data_label(result)}")


def _draw_blocks(axes: Axes, ends: list[float]) -> None:
    """Draw the stages between these ends as squares on the diagonal."""
    for stage, (left, right) in enumerate(itertools.pairwise(ends)):
        for color, width in ((WHITE, 4.5), (stage_colour(stage), 2.5)):
            size = right - left
            axes.add_patch(
                Rectangle((left, left), size, size, fill=False, edgecolor=color, linewidth=width, clip_on=False)
            )


def _label_edges(axes: Axes, result: StageResult) -> None:
    """Write the edges into a corner of the matrix."""
    if result.edges_t:
        box = {"facecolor": "#00224E", "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.5"}
        text = "\n".join(_edge_labels(result, "   "))
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=9, color=WHITE, bbox=box)


def _draw_choice(axes: Axes, result: StageResult) -> None:
    """Draw the mean distance within a stage for 1 to 8 stages."""
    table = result.curves["table"]
    counts = [line["stages"] for line in table]
    axes.plot(counts, [line["distance"] for line in table], color=INK, marker="o", label="images the cuts were made on")
    if table[0]["distance_held_out"] is not None:
        outside = [line["distance_held_out"] for line in table]
        axes.plot(counts, outside, color=SHARED, marker="s", linestyle=(0, (5, 1.5)), label="held-out images")
    axes.axvline(result.settings.stages, color=SOFT, linewidth=1, linestyle=":")
    what = "mean distance" if result.diffusion is None else "mean squared distance"
    axes.set(xlabel="number of stages", ylabel=f"{what} within a stage", xticks=counts)
    axes.set_ylim(bottom=0)
    axes.set_title("How many stages?", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _draw_strip(axes: Axes, result: StageResult, strip: npt.NDArray[np.uint8]) -> None:
    """Draw the strip with a title above every column."""
    cuts = _cuts(result)
    columns = 2 + 3 * len(cuts)
    axes.imshow(_on_clear_ground(strip, columns), interpolation="nearest")
    titles = ["image"]
    for k, cut in enumerate(cuts, start=1):
        titles += [f"noisy,\nedge {k}", *(_time_or_sigma(result, t) for t in (cut - SIDE, cut + SIDE))]
    wide = _wide(axes)
    turned: Any = {"ha": "center", "va": "bottom", "fontsize": 8, "rotation": 0 if wide else 90}
    for i, title in enumerate([*titles, "mean\nimage"]):
        text = title if wide else title.replace("\n", " ")
        axes.text((i + 0.5) * strip.shape[1] / columns, -0.02 * strip.shape[0], text, **turned)
    axes.set_axis_off()
    name = "optimal" if result.diffusion is None else "Wiener"
    words = f"What the {name} denoiser answers{' ' if wide else chr(10)}on both sides of every edge"
    axes.set_title(words, fontsize=10, pad=26 if wide else 58)


def _time_or_sigma(result: StageResult, t: float) -> str:
    """Return a time of the strip, which ends with the kernel's, as text in the units of the result's axes."""
    t = min(max(t, result.time_measure.t_min), result.time_measure.t_max)
    if result.diffusion is None:
        return f"t = {t:.3g}"
    return f"σ = {float(result.time_measure.sigma(torch.tensor(t, dtype=torch.float64))):.3g}"


def _on_clear_ground(strip: npt.NDArray[np.uint8], columns: int) -> npt.NDArray[np.uint8]:
    """Return the pixels of a strip as (H, W, 4), whose gaps are transparent."""
    colour = strip if strip.ndim == 3 else strip[..., None].repeat(3, axis=2)
    inside = []
    for length, count in zip(strip.shape[:2], (ROWS, columns), strict=True):
        place = np.arange(length) % (length // count)
        inside.append((place >= GAP) & (place < length // count - GAP))
    opaque = np.where(inside[0][:, None] & inside[1], 255, 0).astype(np.uint8)
    return np.dstack((colour, opaque))
