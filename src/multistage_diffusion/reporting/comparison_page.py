"""The page of a comparison of runs: errors by noise level, quality against the compute of training and of sampling."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ..evaluation.compared import RunsComparison
from ..evaluation.likelihood import Estimate
from ..files import write_atomic
from ..palette import INK, SOFT, stage_colour
from .html import chart, escape, facts, label, note, page, table, tidy

BITS = 1 / math.log(2)
_HEIGHT = 3.6  # inches of a chart


def bound_words(bound: Estimate | None, pixels: bool) -> str:
    """Return the difference of the variational bound as text, e.g. "-0.012 ± 0.003 bits/dim"; empty for None."""
    if bound is None:
        return ""
    scale, unit = (BITS, "bits/dim") if pixels else (1.0, "nats/dim")
    return f"{scale * bound.mean:+.4f} ± {scale * bound.error:.4f} {unit}"


def write_comparison(found: RunsComparison, out: Path, *, pixels: bool) -> tuple[Path, Path]:
    """Write OUT (HTML) and a PNG of the same charts beside it; return both paths.

    Args:
        found: the comparison.
        out: file of the page.
        pixels: whether the runs are on pixels: their bounds are then in bits per dimension.
    """
    panels = _panels(found)
    picture = out.with_suffix(".png")
    figure = Figure(figsize=(5.2 * len(panels), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (_, draw, _) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes, found)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    write_atomic(out, _page(found, panels, pixels).encode())  # first: whoever finds the picture alone could not go on
    write_atomic(picture, buffer.getvalue())
    return out, picture


Panel = tuple[str, Callable[[Axes, RunsComparison], None], str]  # title, drawing, caption


def _panels(found: RunsComparison) -> list[Panel]:
    """Return the charts for which there is anything to show."""
    known: list[Panel] = [
        (
            "Denoising error",
            _draw_errors,
            f"{_what(found)}, on the same {_images(found)} and noise; bands: two standard errors; dotted: stage edges",
        )
    ]
    if sum(len(run.training) > 0 for run in found.runs) > 1:
        caption = f"Fréchet distance ({found.features}) while training, against the compute of training"
        known.append(("Training", _draw_training, caption))
    if sum(len(run.sampling) > 0 for run in found.runs) > 1:
        caption = f"Fréchet distance ({found.features}) of these checkpoints, against the compute of a sample"
        known.append(("Sampling", _draw_sampling, caption))
    return known


def _images(found: RunsComparison) -> str:
    return "training images" if found.excess else "held-out images"


def _what(found: RunsComparison) -> str:
    if found.excess:
        return "Excess: the part of each run's denoising error that is above the least possible"
    return f"Denoising error of each run relative to {found.runs[0].name}"


def _axis(found: RunsComparison) -> str:
    return "excess, % of the error" if found.excess else f"error, % from {label(found.runs[0].name)}'s"


def _page(found: RunsComparison, panels: Sequence[Panel], pixels: bool) -> str:
    base, others = found.runs[0], found.runs[1:]
    head = facts({"base": base.name, _images(found): found.rows, "noise levels": len(found.sigmas)})
    names = ", ".join(run.name for run in others)
    lines = [[run.name, run.step, bound_words(run.bound, pixels) or "base"] for run in found.runs]
    summary = table(["run", "step", "variational bound, less the base's"], lines, name="Bounds") + note(
        "The bound is the error over sigma², integrated over ln sigma between the lowest and the highest of these noise levels; "
        "the same images and noise for all runs, so differences are paired."
    )
    sections = [("summary", "In short", summary)]
    sections += [(title.split()[0].lower(), title, _chart(draw, found, caption)) for title, draw, caption in panels]
    sections.append(("numbers", "Numbers", _numbers(found)))
    return page(
        f"{base.name} and {names}",
        f"<p>msdiff comparison</p><h1>{escape(base.name)} and {escape(names)}</h1>{head}",
        sections,
    )


def _chart(draw: Callable[[Axes, RunsComparison], None], found: RunsComparison, caption: str) -> str:
    return chart(lambda figure: draw(figure.subplots(), found), _HEIGHT, caption)


def _draw_errors(axes: Axes, found: RunsComparison) -> None:
    axes.axhline(0, color=SOFT, linewidth=1)
    for number, run in enumerate(found.runs[1:], start=1):
        means = [100 * d.mean for d in run.differences]
        band = [200 * d.error for d in run.differences]
        low, high = ([m + s * b for m, b in zip(means, band, strict=True)] for s in (-1, 1))
        axes.plot(found.sigmas, means, "o-", color=stage_colour(number), markersize=3, label=label(run.name))
        axes.fill_between(found.sigmas, low, high, color=stage_colour(number), alpha=0.2, linewidth=0)
        for edge in run.edges:
            axes.axvline(edge, color=stage_colour(number), linewidth=1, linestyle=":")
    axes.set(xlabel="sigma", ylabel=_axis(found))
    tidy(axes, "log", "linear", "Denoising error")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(frameon=False)


def _draw_training(axes: Axes, found: RunsComparison) -> None:
    _draw_curves(axes, found, {run.name: [(1e15 * x, y) for x, y in run.training] for run in found.runs})
    axes.set(xlabel="training FLOPs", ylabel="Fréchet distance")
    tidy(axes, "log", "log", "Quality by training")


def _draw_sampling(axes: Axes, found: RunsComparison) -> None:
    _draw_curves(axes, found, {run.name: [(1e9 * x, y) for x, y in run.sampling] for run in found.runs})
    axes.set(xlabel="FLOPs per sample", ylabel="Fréchet distance")
    tidy(axes, "log", "log", "Quality by sampling")


def _draw_curves(axes: Axes, found: RunsComparison, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    for number, (name, points) in enumerate(curves.items()):
        if points:
            colour = stage_colour(number) if number else INK
            axes.plot(*zip(*points, strict=True), "o-", color=colour, markersize=4, label=label(name))
    axes.legend(frameon=False)
    costs = [cost for points in curves.values() for cost, _ in points]
    if costs and max(costs) < 2 * min(costs):  # equal costs look equal
        axes.set_xlim(min(costs) / 2, max(costs) * 2)


def _numbers(found: RunsComparison) -> str:
    others = found.runs[1:]
    lines: list[list[Any]] = []
    for level, sigma in enumerate(found.sigmas):
        differences = [run.differences[level] for run in others]
        words = [f"{100 * d.mean:+.2f} ± {100 * d.error:.2f} %" for d in differences]
        lines.append([f"{sigma:.4g}", f"{found.runs[0].errors[level]:.5f}", *words])
    return table(
        ["sigma", f"{found.runs[0].name}: error", *(run.name for run in others)], lines, name="Errors by noise level"
    )
