"""The report's charts of a training: losses, gradient norms, evaluations by compute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from ..evaluation.measuring import displays
from ..evaluation.registry import Display
from ..palette import INK, SHARED, stage_colour
from .html import chart, is_narrow, label, note, tidy

Record = Mapping[str, Any]

POINTS = 300  # most points per curve; beyond that, neighbouring log lines are averaged
PANELS = 3  # loss charts in a row


def training_charts(train: Sequence[Record], held_out: Sequence[Record], stages: int) -> str:
    """Draw losses and gradient norms; both arguments are lines of metrics.jsonl."""
    if not train:
        return note("No training was logged.")
    seconds = training_seconds(train)
    rate = train[-1]["images"] / seconds if seconds > 0 else 0.0
    return (
        chart(
            lambda figure: _draw_losses(figure, train, held_out, stages),
            2.9 * math.ceil(stages / PANELS),
            "Loss per stage: training (line) and held-out images under the averaged weights (dots).",
            2.2 * stages,
        )
        + chart(
            lambda figure: _draw_norms(figure, train),
            3.0,
            "Gradient norm of each part of the network, before clipping.",
        )
        + note(f"{rate:,.0f} images per second on average; last learning rate {train[-1]['lr']:.3g}.")
    )


def training_seconds(train: Sequence[Record]) -> float:
    """Return the time of all steps, of lines of metrics.jsonl: what a stop leaves unlogged counts at the next line's rate."""
    before = [0, *(r["images"] for r in train)]
    rates = [(r["images"] - b, r["images_per_s"]) for r, b in zip(train, before, strict=False)]
    return float(sum(images / rate for images, rate in rates if rate > 0))


def _draw_losses(figure: Figure, train: Sequence[Record], held_out: Sequence[Record], stages: int) -> None:
    columns = 1 if is_narrow(figure) else min(stages, PANELS)
    panels = figure.subplots(math.ceil(stages / columns), columns, squeeze=False).flat
    for k, axes in enumerate(panels):
        if k >= stages:
            axes.set_axis_off()
            continue
        axes.plot(*_curve(train, lambda r, k=k: r["loss"][k]), color=stage_colour(k), linewidth=1.4)
        held = [(r["images"], r["loss"][k]) for r in held_out if r["loss"][k] is not None]
        if held:
            axes.plot(*zip(*held, strict=True), "o", color=INK, markersize=3)
        axes.set_xlabel("images seen")
        tidy(axes, "log", "log", f"Stage {k + 1}")


def _draw_norms(figure: Figure, train: Sequence[Record]) -> None:
    axes = figure.subplots()
    for name in dict.fromkeys(name for r in train for name in r["grad_norm"]):
        part, _, stage = name.partition(".")
        tint = stage_colour(int(stage) - 1) if stage.isdigit() else SHARED
        points = _curve(train, lambda r, name=name: r["grad_norm"].get(name))
        axes.plot(*points, color=tint, linewidth=1.2, label=label(f"{part} {stage}".strip()))
    axes.set_xlabel("images seen")
    tidy(axes, "linear", "log")
    axes.legend(frameon=False, ncols=2 if is_narrow(figure) else 5, loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)


def evaluation_charts(evaluated: Sequence[Record]) -> str:
    """Draw the Fréchet distances and further metrics that were measured during training."""
    if not evaluated:
        return ""
    curves = {"frechet": [(r, r["frechet"]) for r in evaluated if r["frechet"] is not None]}
    for name in dict.fromkeys(name for r in evaluated for name in r.get("metrics", {})):
        curves.setdefault(name, [(r, r["metrics"][name]) for r in evaluated if name in r.get("metrics", {})])
    if not curves["frechet"]:
        return note("No samples could be evaluated during training.")
    known = displays()
    return "".join(_evaluation_chart(known.get(n, Display(name=n, label=n)), points) for n, points in curves.items())


def _evaluation_chart(display: Display, points: Sequence[tuple[Record, float]]) -> str:
    last, _ = points[-1]
    better = f"{display.better.title()} is better; " if display.better else ""
    return chart(
        lambda figure: _draw_evaluation(figure, display, points),
        3.0,
        f"{display.label} of samples during training against {Path(last['reference']).name}, by training compute. "
        f"{better}values of other features or counts are not comparable.",
    )


def _draw_evaluation(figure: Figure, display: Display, points: Sequence[tuple[Record, float]]) -> None:
    axes = figure.subplots()
    x, y = [record["petaflops"] for record, _ in points], [value for _, value in points]
    axes.plot(x, y, "o-", color=SHARED, linewidth=1.4, markersize=4)
    if display.better:
        best = (min if display.better == "lower" else max)(range(len(y)), key=y.__getitem__)
        step = points[best][0]["step"]
        axes.plot(x[best], y[best], "o", color=INK, markersize=6, label=f"best: {y[best]:.4g} at step {step:,}")
        axes.legend(frameon=False, loc="best", fontsize=9)
    axes.set_xlabel("training PFLOPs")
    last, _ = points[-1]
    features = f"features {label(last['extractor'])}, {last['count']:,} samples"
    title = f"{label(display.label)}:{chr(10) if is_narrow(figure) else ' '}{features}"
    tidy(axes, "linear", "log" if min(y) > 0 and display.unit != "%" else "linear", title)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _curve(records: Sequence[Record], value: Any) -> tuple[list[float], list[float]]:
    """Return images seen and values: at most POINTS points, each the mean of as many log lines as the others."""
    points = [(r["images"], v) for r in records if (v := value(r)) is not None and math.isfinite(v)]
    width = max(1, math.ceil(len(points) / POINTS))
    groups = [list(zip(*points[i : i + width], strict=True)) for i in range(0, len(points), width)]
    return [sum(x) / len(x) for x, _ in groups], [sum(y) / len(y) for _, y in groups]
