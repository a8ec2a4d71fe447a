"""Pictures of a split."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .. import serialization
from .result import SplitResult

# Okabe and Ito's colours, told apart with any colour vision
_BLUE, _ORANGE, _INK, _GREY = "#0072B2", "#D55E00", "#222222", "#777777"
_BANDS = ("#E8F1F8", "#FFFFFF", "#FBEDE3")  # lowest noise, between, highest noise


def plot_split(result: SplitResult, path: Path | str) -> None:
    """Draw what the edges were read from, as a PNG.

    Algorithm 1: S0 and S1 over t, alpha and the edges; algorithm 2: the similarity matrix with the stages as blocks.
    The axes show the time in which averages are uniform; edges are labelled in the result's own kernel and in sigma.
    """
    first = result.settings.algorithm == 1
    figure = Figure(figsize=(8.0, 4.8) if first else (6.8, 5.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.spines[["top", "right"] if first else ["top", "right", "left", "bottom"]].set_visible(False)
    if first:
        _draw_curves(axes, result)
    else:
        _draw_matrix(figure, axes, result)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    serialization.write_atomic(Path(path), buffer.getvalue())


def _cuts(result: SplitResult) -> list[float]:
    """Return the edges in the time of the curves."""
    return [float(result.time_measure.time(sigma)) for sigma in result.edges_sigma]


def _edge_labels(result: SplitResult, separator: str) -> list[str]:
    """Return "t = ..., σ = ..." of every edge, with the kernel's name where it is not the axes'."""
    kernel = "" if result.schedule == result.time_measure else f" ({result.schedule.kind})"
    edges = zip(result.edges_t, result.edges_sigma, strict=True)
    return [f"t = {t:.4g}{kernel}{separator}σ = {sigma:.4g}" for t, sigma in edges]


def _data_label(result: SplitResult) -> str:
    low, high = result.data_range
    return f"data in [{low:g}, {high:g}]"


def _draw_curves(axes: Axes, result: SplitResult) -> None:
    """Draw S0, S1, alpha, the edges and the stages as bands."""
    settings, cuts = result.settings, _cuts(result)
    bounds = [result.time_measure.t_min, *cuts, result.time_measure.t_max]
    for stage, (left, right) in enumerate(itertools.pairwise(bounds)):
        axes.axvspan(left, right, color=_BANDS[stage], zorder=0, linewidth=0)
        axes.text((left + right) / 2, 1.19, f"stage {stage + 1}", ha="center", color=_GREY, fontsize=10)
    aligned = ("right", "left") if cuts[1] - cuts[0] < 0.14 else ("center", "center")  # close labels would overlap
    for cut, label, align in zip(cuts, _edge_labels(result, "\n"), aligned, strict=True):
        axes.plot((cut, cut), (0, 1.03), color=_INK, linewidth=1.0, zorder=2)
        axes.text(cut, 1.05, label, ha=align, va="bottom", fontsize=8.5, color=_INK)
    _draw_similarities(axes, result)
    axes.axhline(settings.alpha, color=_GREY, linewidth=1, linestyle=":", zorder=1, label=f"α = {settings.alpha:g}")
    axes.set(xlim=(0, result.time_measure.t_max), ylim=(0, 1.26), yticks=np.arange(0, 1.01, 0.2))
    axes.set(xlabel="t (VP)", ylabel="similarity of the optimal denoisers")
    axes.set_title(f"Three stages: rule {settings.rule}, η = {settings.eta:.3g}, {_data_label(result)}", fontsize=11)
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3)


def _draw_similarities(axes: Axes, result: SplitResult) -> None:
    """Draw S0 and S1 and, for rule "interval-mean", the means whose crossing of alpha makes the edges."""
    t, s0, s1 = (np.asarray(result.curves[name]) for name in ("t", "s0", "s1"))
    axes.plot(t, s0, color=_BLUE, linewidth=2, label="S₀: as at t → 0 (clean image)")
    axes.plot(t, s1, color=_ORANGE, linewidth=2, linestyle=(0, (5, 1.5)), label="S₁: as at t → 1 (mean image)")
    if result.rule == "interval-mean":
        count = np.arange(1, len(t) + 1)
        below, above = s0.cumsum() / count, (s1[::-1].cumsum() / count)[::-1]
        axes.plot(t, below, color=_BLUE, linewidth=1, alpha=0.7, label="mean of S₀ below t")
        axes.plot(
            t, above, color=_ORANGE, linewidth=1, alpha=0.7, linestyle=(0, (5, 1.5)), label="mean of S₁ from t on"
        )


def _draw_matrix(figure: Figure, axes: Axes, result: SplitResult) -> None:
    """Draw the similarity of all pairs of times, each cell from its time to the next, and the stages as blocks."""
    t = np.asarray(result.curves["t"])
    borders = np.append(t, 2 * t[-1] - t[-2])
    mesh = axes.pcolormesh(borders, borders, result.curves["similarity"], cmap="cividis", vmin=0, vmax=1)
    figure.colorbar(mesh, ax=axes, shrink=0.9, label="mean similarity")
    ends = [float(borders[0]), *_cuts(result), float(borders[-1])]
    for left, right in itertools.pairwise(ends):
        for color, width in (("white", 3.5), (_ORANGE, 2.0)):
            size = right - left
            axes.add_patch(
                Rectangle((left, left), size, size, fill=False, edgecolor=color, linewidth=width, clip_on=False)
            )
    if result.edges_t:
        box = {"facecolor": "#00224E", "alpha": 0.75, "edgecolor": "none", "boxstyle": "round,pad=0.5"}
        text = "\n".join(_edge_labels(result, "   "))
        axes.text(0.04, 0.96, text, transform=axes.transAxes, va="top", fontsize=9, color="white", bbox=box)
    axes.set(aspect="equal", xlabel="t (VP)", ylabel="t (VP)")
    count, settings = len(ends) - 1, result.settings
    stages = "1 stage" if count == 1 else f"{count} stages"
    axes.set_title(f"{stages}: {settings.objective}, {settings.space} space, {_data_label(result)}", fontsize=11)
