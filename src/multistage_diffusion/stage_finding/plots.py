"""Plots of the found stages."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from .. import files
from ..escaping import counted
from .edge_preview import SIDE, decode_png
from .finding import NoMiddleStageError
from .result import StageResult
from .settings import StageSettings

# Okabe and Ito's colours, distinguishable with every type of colour vision
_BLUE, _ORANGE, _INK, _GREY = "#0072B2", "#D55E00", "#222222", "#777777"
_BANDS = ("#E8F1F8", "#FFFFFF", "#FBEDE3")  # lowest noise, between, highest noise


def plot_stages(result: StageResult, path: Path | str) -> None:
    """Write a PNG of the edges and the data from which they were computed.

    Algorithm 1: S0 and S1 over t with 95 % bands, alpha, and the edges with their intervals. Algorithm 2: the
    similarity matrix with the stages as blocks, and the distance within stages for 1 to 8 stages. "gradient": the same
    with the cosines of gradients. Denoiser "gaussian": distances of the network's outputs over the quantiles of the training
    density, and the same choice. The other baselines: their values over t. The lower part shows the optimal denoiser's
    outputs for some images on both sides of every edge. The axes show the time in which averages are uniform. Edges are
    labelled in the result's own kernel and in sigma.
    """
    draw = {1: _draw_curves, "timestep": _draw_values, "snr": _draw_values}.get(result.settings.algorithm)
    top = (10.4, 5.4) if draw is None else (8.0, 4.8)
    strip = None if not result.strip else decode_png(result.strip)
    below = 0.0 if strip is None else (top[0] - 1.0) * strip.shape[0] / strip.shape[1] + 0.6
    figure = Figure(figsize=(top[0], top[1] + below), layout="constrained")
    FigureCanvasAgg(figure)
    upper: Figure | SubFigure = figure
    if strip is not None:
        halves = figure.subfigures(2, 1, height_ratios=(top[1], below), squeeze=False)[:, 0]
        upper = halves[0]
        _draw_strip(halves[1].add_subplot(), result, strip)
    if draw is not None:
        axes = upper.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, result)
    else:
        axes, choice = upper.subplots(1, 2, width_ratios=(1.6, 1))
        axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
        (_draw_matrix if result.diffusion is None else _draw_distances)(upper, axes, result)
        choice.spines[["top", "right"]].set_visible(False)
        _draw_choice(choice, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    files.write_atomic(Path(path), buffer.getvalue())


def plot_overlap(error: NoMiddleStageError, path: Path | str) -> None:
    """Write a PNG of the curves whose outer stages overlap."""
    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    _draw_similarities(axes, error.curves, error.settings)
    axes.set(ylim=(0, 1.05))
    axes.set_title(f"No middle stage: rule {error.settings.rule}, η = {error.settings.eta:.3g}", fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    files.write_atomic(Path(path), buffer.getvalue())


def _cuts(result: StageResult) -> list[float]:
    """Return the edges in the time of the curves."""
    return [float(result.time_measure.time(sigma)) for sigma in result.edges_sigma]


def _edge_labels(result: StageResult, separator: str) -> list[str]:
    """Return "t = ..., σ = ..." of every edge, with the kernel's name if it differs from the kernel of the axes."""
    kernel = "" if result.schedule == result.time_measure else f" ({result.schedule.kind})"
    edges = zip(result.edges_t, result.edges_sigma, strict=True)
    return [f"t = {t:.4g}{kernel}{separator}σ = {sigma:.4g}" for t, sigma in edges]


def _data_label(result: StageResult) -> str:
    return "latents" if result.data_range is None else "data in [{:g}, {:g}]".format(*result.data_range)


def _draw_curves(axes: Axes, result: StageResult) -> None:
    """Draw S0, S1, alpha, the edges and the stages as bands."""
    settings, cuts = result.settings, _cuts(result)
    bounds = [result.time_measure.t_min, *cuts, result.time_measure.t_max]
    for stage, (left, right) in enumerate(itertools.pairwise(bounds)):
        axes.axvspan(left, right, color=_BANDS[stage], zorder=0, linewidth=0)
        axes.text((left + right) / 2, 1.19, f"stage {stage + 1}", ha="center", color=_GREY, fontsize=10)
    aligned = ("right", "left") if cuts[1] - cuts[0] < 0.14 else ("center", "center")  # close labels would overlap
    for low, high in result.intervals_t if result.schedule == result.time_measure else ():
        axes.axvspan(low, high, ymax=1.03 / 1.26, color=_INK, alpha=0.15, linewidth=0, zorder=1)
    for cut, label, align in zip(cuts, _edge_labels(result, "\n"), aligned, strict=True):
        axes.plot((cut, cut), (0, 1.03), color=_INK, linewidth=1.0, zorder=2)
        axes.text(cut, 1.05, label, ha=align, va="bottom", fontsize=8.5, color=_INK)
    _draw_similarities(axes, result.curves, settings)
    axes.set(xlim=(0, result.time_measure.t_max), ylim=(0, 1.26), yticks=np.arange(0, 1.01, 0.2))
    axes.set_title(f"Three stages: rule {settings.rule}, η = {settings.eta:.3g}, {_data_label(result)}", fontsize=11)


def _draw_values(axes: Axes, result: StageResult) -> None:
    """Draw the values that a baseline groups, the edges and the stages as bands."""
    cuts = _cuts(result)
    bounds = [0.0, *cuts, result.time_measure.t_max]
    for stage, (left, right) in enumerate(itertools.pairwise(bounds)):
        axes.axvspan(left, right, color=_BANDS[stage % 2], zorder=0, linewidth=0)
        axes.text(
            (left + right) / 2, 1.02, f"{stage + 1}", ha="center", color=_GREY, transform=axes.get_xaxis_transform()
        )
    for cut, label in zip(cuts, _edge_labels(result, "\n"), strict=True):
        axes.axvline(cut, color=_INK, linewidth=1.0)
        axes.text(
            cut, 0.02, label, rotation=90, va="bottom", ha="right", fontsize=8, transform=axes.get_xaxis_transform()
        )
    axes.plot(result.curves["t"], result.curves["value"], color=_BLUE, linewidth=2)
    name = {"timestep": "t", "snr": "log-SNR"}[result.rule]
    axes.set(xlim=(0, result.time_measure.t_max), xlabel="t (VP)", ylabel=name)
    axes.set_title(f"Baseline: stages of like {name}, whatever the data", fontsize=11, pad=18)


def _draw_similarities(axes: Axes, curves: dict[str, Any], settings: StageSettings) -> None:
    """Draw S0, S1, alpha and, for rule "interval-mean", the means that cross alpha at the edges."""
    t, s0, s1 = (np.asarray(curves[name]) for name in ("t", "s0", "s1"))
    for mean, error, color in ((s0, "s0_error", _BLUE), (s1, "s1_error", _ORANGE)):
        band = 1.96 * np.asarray(curves[error])
        axes.fill_between(t, mean - band, mean + band, color=color, alpha=0.25, linewidth=0)
    axes.plot(t, s0, color=_BLUE, linewidth=2, label="S₀: as at t → 0 (clean image)")
    axes.plot(t, s1, color=_ORANGE, linewidth=2, linestyle=(0, (5, 1.5)), label="S₁: as at t → 1 (mean image)")
    if settings.rule == "interval-mean":
        count = np.arange(1, len(t) + 1)
        below, above = s0.cumsum() / count, (s1[::-1].cumsum() / count)[::-1]
        axes.plot(t, below, color=_BLUE, linewidth=1, alpha=0.7, label="mean of S₀ below t")
        axes.plot(
            t, above, color=_ORANGE, linewidth=1, alpha=0.7, linestyle=(0, (5, 1.5)), label="mean of S₁ from t on"
        )
    axes.axhline(settings.alpha, color=_GREY, linewidth=1, linestyle=":", zorder=1, label=f"α = {settings.alpha:g}")
    axes.set(xlabel="t (VP)", ylabel="similarity of the optimal denoisers")
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def _draw_matrix(figure: Figure | SubFigure, axes: Axes, result: StageResult) -> None:
    """Draw the similarity of all pairs of times (a cell extends from its time to the next) and the stages as blocks."""
    t = np.asarray(result.curves["t"])
    borders = np.append(t, 2 * t[-1] - t[-2])
    gradients = result.settings.algorithm == "gradient"
    lowest = min(0.0, float(np.min(result.curves["similarity"])))
    mesh = axes.pcolormesh(borders, borders, result.curves["similarity"], cmap="cividis", vmin=lowest, vmax=1)
    figure.colorbar(mesh, ax=axes, shrink=0.9, label="mean cosine of gradients" if gradients else "mean similarity")
    ends = [float(borders[0]), *_cuts(result), float(borders[-1])]
    _draw_blocks(axes, ends)
    _label_edges(axes, result)
    axes.set(aspect="equal", xlabel="t (VP)", ylabel="t (VP)")
    settings = result.settings
    compared = "gradients of a trained run" if gradients else f"{settings.space} space"
    axes.set_title(
        f"{counted(len(ends) - 1, 'stage')}: {settings.objective}, {compared}, {_data_label(result)}", fontsize=11
    )


def _draw_distances(figure: Figure | SubFigure, axes: Axes, result: StageResult) -> None:
    """Draw the distance of the network's outputs at all pairs of noise levels, and the stages as blocks.

    The axes are even in the share of training noise, and labelled with sigma.
    """
    sigma, distance = np.asarray(result.curves["sigma"]), np.asarray(result.curves["distance"])
    share = (np.arange(len(sigma)) + 0.5) / len(sigma)
    shown = axes.imshow(np.sqrt(distance), cmap="cividis_r", vmin=0, origin="lower", extent=(0.0, 1.0, 0.0, 1.0))
    figure.colorbar(shown, ax=axes, shrink=0.9, label="rms distance of the network's outputs")
    cuts = np.interp(np.log(result.edges_sigma), np.log(sigma), share).tolist()
    _draw_blocks(axes, [0.0, *cuts, 1.0])
    ticks = np.interp((0.05, 0.25, 0.5, 0.75, 0.95), share, np.log(sigma))
    labels = [f"{value:.2g}" for value in np.exp(ticks)]
    places = (0.05, 0.25, 0.5, 0.75, 0.95)
    axes.set(aspect="equal", xlabel="σ, at even shares of the training noise", ylabel="σ")
    axes.set_xticks(places, labels)
    axes.set_yticks(places, labels)
    _label_edges(axes, result)
    axes.set_title(f"{counted(len(cuts) + 1, 'stage')}: Wiener denoiser, {_data_label(result)}", fontsize=11)


def _draw_blocks(axes: Axes, ends: list[float]) -> None:
    """Draw the stages between these ends as squares on the diagonal."""
    for left, right in itertools.pairwise(ends):
        for color, width in (("white", 3.5), (_ORANGE, 2.0)):
            size = right - left
            axes.add_patch(
                Rectangle((left, left), size, size, fill=False, edgecolor=color, linewidth=width, clip_on=False)
            )


def _label_edges(axes: Axes, result: StageResult) -> None:
    """Write the edges into a corner of the matrix."""
    if result.edges_t:
        box = {"facecolor": "#00224E", "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.5"}
        text = "\n".join(_edge_labels(result, "   "))
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=9, color="white", bbox=box)


def _draw_choice(axes: Axes, result: StageResult) -> None:
    """Draw the mean distance within a stage for 1 to 8 stages."""
    table = result.curves["table"]
    counts = [line["stages"] for line in table]
    axes.plot(
        counts, [line["distance"] for line in table], color=_BLUE, marker="o", label="images the cuts were made on"
    )
    if table[0]["distance_held_out"] is not None:
        outside = [line["distance_held_out"] for line in table]
        axes.plot(counts, outside, color=_ORANGE, marker="s", linestyle=(0, (5, 1.5)), label="held-out images")
    axes.axvline(result.settings.stages, color=_GREY, linewidth=1, linestyle=":")
    what = "mean distance" if result.diffusion is None else "mean squared distance"
    axes.set(xlabel="number of stages", ylabel=f"{what} within a stage", xticks=counts)
    axes.set_ylim(bottom=0)
    axes.set_title("How many stages?", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def _draw_strip(axes: Axes, result: StageResult, strip: npt.NDArray[np.uint8]) -> None:
    """Draw the strip with a title above every column."""
    axes.imshow(strip, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    cuts = _cuts(result)
    columns = 2 + 3 * len(cuts)
    titles = ["image"]
    for k, cut in enumerate(cuts, start=1):
        titles += [f"noisy,\nedge {k}", f"t = {max(cut - SIDE, 0):.3g}", f"t = {cut + SIDE:.3g}"]
    for i, title in enumerate([*titles, "mean\nimage"]):
        axes.text(
            (i + 0.5) * strip.shape[1] / columns, -0.02 * strip.shape[0], title, ha="center", va="bottom", fontsize=8
        )
    axes.set_axis_off()
    name = "optimal" if result.diffusion is None else "Wiener"
    axes.set_title(f"What the {name} denoiser answers on both sides of every edge", fontsize=10, pad=26)
