"""The report of a run in one HTML file: stages, network, losses, samples, metrics, and the command that made it.

The file opens from disk without a network: it contains its style, charts (SVG) and pictures (PNG data URLs). It follows the
reader's theme, light or dark, and fits pages from 390 pixels on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from ..config import RunConfig
from ..config.serialization import to_dict
from ..data.opening import load_png
from ..errors import UserError
from ..evaluation import read_result
from ..evaluation.presentation import counts_sentence, features_sentence, rows
from ..files import write_atomic
from ..palette import stage_variable
from ..reading import brief
from ..records import read_evaluations, read_launches, read_metrics
from ..stage_finding import StageResult
from ..stage_finding.plots import draw_stages, stages_height
from .html import NARROW, WIDE, bar, chart, drawing, escape, facts, note, page, picture, table
from .pictures import STRIP, cell, data_uri, grid
from .training_charts import evaluation_charts, training_charts, training_seconds

Record = Mapping[str, Any]

GAP = 3  # pixels between images
FRAMES = 6  # pictures of samples over training
NAMED = 10  # classes named in the header


@dataclass(frozen=True, kw_only=True)
class ArchitectureRow:
    """A row of the architecture table: a stage, the shared encoder, or the whole network.

    Attributes:
        name: e.g. "stage 1".
        parameters: number of parameters; a stage's include its encoder's.
        multiply_adds: per image and call; None where it makes no sense.
        width: channels at full resolution; None for the whole network.
        sigma: [low, high) of a stage; None for other rows.
        t: the same edges in the schedule's time.
        noise, rows, steps, compute: a stage's shares of the training's density, rows, steps and FLOPs; None for other rows.
    """

    name: str
    parameters: int
    multiply_adds: int | None = None
    width: int | None = None
    sigma: tuple[float, float] | None = None
    t: tuple[float, float] | None = None
    noise: float | None = None
    rows: float | None = None
    steps: float | None = None
    compute: float | None = None


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Samples, uint8 (N, C, H, W), beside their nearest training images (same shape) and the N distances."""

    samples: Tensor
    nearest: Tensor
    distances: Sequence[float]

    def __post_init__(self) -> None:
        if self.samples.shape != self.nearest.shape or len(self.distances) != len(self.samples):
            raise UserError(
                f"neighbours: {tuple(self.samples.shape)} samples, {tuple(self.nearest.shape)} nearest images and "
                f"{len(self.distances)} distances; their numbers must be equal"
            )


def write_report(
    run: Path,
    *,
    config: RunConfig,
    architecture: Sequence[ArchitectureRow],
    samples: Tensor,
    real: Tensor,
    neighbours: Neighbours | None = None,
    sample_classes: Sequence[str] | None = None,
    real_classes: Sequence[str] | None = None,
    stages_png: Path | None = None,
    found: StageResult | None = None,
    network_svg: str | None = None,
    evaluation: Sequence[Any] | None = None,
) -> Path:
    """Write RUN/report.html and return its path.

    Args:
        run: folder of the run; its metrics.jsonl, launches.jsonl and evaluation.json are shown if present.
        config: the run's configuration.
        architecture: lines of the network table, stages first.
        samples: uint8 (N, C, H, W), generated images.
        real: uint8 (M, C, H, W), held-out or training images to show beside them.
        neighbours: samples with their nearest training images.
        sample_classes, real_classes: name of the class of each of these images; None: not shown.
        stages_png: picture of the curves from which the stages were found, if there is no `found`.
        found: the result that the stages are from; its curves are drawn.
        network_svg: drawing of the network, see `network_drawing`.
        evaluation: results (EvaluationResult or its dictionary); default: those of RUN/evaluation.json.

    Raises:
        UserError: for images of another type or shape, or a file of the run that cannot be read.
    """
    if evaluation is None:
        evaluation = read_evaluations(run / "evaluation.json")
    records = read_metrics(run / "metrics.jsonl", len(config.stages))
    launches = read_launches(run / "launches.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    held_out = [r for r in records if r["kind"] == "held_out"]
    evaluated = [r for r in records if r["kind"] == "quality"]
    metrics = "".join(_metrics(to_dict(result)) for result in evaluation)
    pair = _samples(config, samples, real, sample_classes, real_classes)
    sections = [
        ("stages", "Stages", _stages(config, architecture, stages_png, found)),
        ("network", "Network", _network(architecture, network_svg)),
        ("training", "Training", training_charts(train, held_out, len(config.stages)) + evaluation_charts(evaluated)),
        ("samples", "Samples", pair + _strip(run / "samples", config)),
        ("neighbours", "Nearest training images", _neighbours(neighbours)),
        ("metrics", "Metrics", metrics or note("Not evaluated yet.")),
        ("origin", "Command and configuration", _origin(config, launches)),
    ]
    path = run / "report.html"
    text = page(f"{config.name} · multistage-diffusion", _header(config, train, launches), sections)
    write_atomic(path, text.encode())
    return path


def _header(config: RunConfig, train: Sequence[Record], launches: Sequence[Record]) -> str:
    last = launches[-1] if launches else {}
    release = last.get("version", version("multistage-diffusion"))
    values = {
        "Data": config.data.source,
        **({"Classes": _classes(config)} if config.network.num_classes else {}),
        "Stages": len(config.stages),
        "Images seen": f"{train[-1]['images']:,}" if train else "none logged",
        "Steps": f"{train[-1]['step']:,}" if train else "none logged",
        "Training time": _duration(training_seconds(train)) if train else "none logged",
        "Device": last.get("device", "not recorded"),
        "Version": f"{release} (torch {last['torch']})" if "torch" in last else release,
        "Report written": datetime.now().strftime("%Y-%m-%d %H:%M"),
    }
    return f"<p>multistage-diffusion run</p><h1>{escape(config.name)}</h1>{facts(values)}"


def _classes(config: RunConfig) -> str:
    """Return the number of classes and the names of the first ones."""
    count, names = config.network.num_classes, config.data.class_names
    shown = ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")
    return f"{count}: {shown}" if names else str(count)


def load_stages_png(path: Path) -> Image.Image:
    """Return the picture of a run's stages.

    Raises:
        UserError: naming the file, if it is not a readable PNG image.
    """
    return load_png(path, str(path), "remove it, or write it again with msdiff stages")


def _stages(
    config: RunConfig, architecture: Sequence[ArchitectureRow], stages_png: Path | None, found: StageResult | None
) -> str:
    """Draw what each stage gets as bars; below them the curves from which the stages were found."""
    schedule, stages = config.diffusion.schedule, config.stages
    cuts = [min(max(schedule.edge_time(edge), schedule.t_min), schedule.t_max) for edge in stages.interior]
    spans = list(pairwise([schedule.t_min, *cuts, schedule.t_max]))
    whole = schedule.t_max - schedule.t_min
    kind = schedule.kind.upper() if len(schedule.kind) < 4 else schedule.kind  # VP, VE, EDM
    time = f"{kind} time, {schedule.t_min:.4g} to {schedule.t_max:.4g}"
    bars = bar(f"Share of the noise range ({time})", [(end - start) / whole for start, end in spans])
    bars += '<p class="ends"><span>clean image</span><span>pure noise</span></p>'
    for name, title in (
        ("noise", "Share of the training's noise"),
        ("rows", "Share of the training's rows (an image with its noise)"),
        ("compute", "Share of the training's compute"),
    ):
        shares = [s for row in architecture if (s := getattr(row, name)) is not None]
        bars += bar(title, shares) if len(shares) == len(stages) else ""
    key = ""
    for k, (start, end) in enumerate(spans):
        interval = f"{_interval(stages.interval(k))}, {kind} time {start:.4g} to {end:.4g}"
        key += f'<li><i style="--c:{stage_variable(k)}"></i><b>Stage {k + 1}</b> σ in {escape(interval)}</li>'
    return f'{bars}<ul class="key">{key}</ul>{_curves(stages_png, found)}'


def _curves(stages_png: Path | None, found: StageResult | None) -> str:
    """Draw the curves from which the stages were found, or show their picture."""
    words = (
        "The stages: where the noise was cut, and what was measured over it where the cut was found from the images."
    )
    if found is not None and found.settings.algorithm == "timestep":
        return note("No curves: the stages are of equal length in time, whatever the images.")
    if found is not None:
        heights = [stages_height(found, width) for width in (WIDE, NARROW)]
        return chart(lambda figure: draw_stages(figure, found), heights[0], words, heights[1])
    if stages_png is not None:
        return picture(load_stages_png(stages_png), words, smooth=True)
    return note("No similarity curves: the stages were given, not found on the data.")


def _network(rows: Sequence[ArchitectureRow], svg: str | None) -> str:
    head = ("", "Width", "σ interval", "Time interval", "Parameters", "Multiply-adds")
    lines = [
        (
            row.name,
            row.width or "",
            _interval(row.sigma) if row.sigma else "",
            f"{row.t[0]:.4g} – {row.t[1]:.4g}" if row.t else "",
            _count(row.parameters),
            "" if row.multiply_adds is None else _count(row.multiply_adds),
        )
        for row in rows
    ]
    drawn = "" if svg is None else drawing(svg, "The network, to scale: the encoder, and the decoder of each stage.")
    return (
        drawn
        + table(head, lines, name="Parameters and arithmetic of the network")
        + note("Multiply-adds are for one image and one call. A stage's numbers include its encoder, shared or not.")
        + _shares(rows)
    )


def _shares(rows: Sequence[ArchitectureRow]) -> str:
    """Tabulate what each stage gets of the training, as far as it is known."""
    known = [(row.name, (row.noise, row.rows, row.steps, row.compute)) for row in rows]
    lines = [
        (name, *(f"{share:.1%}" for share in shares if share is not None))
        for name, shares in known
        if None not in shares
    ]
    if not lines:
        return ""
    return table(("", "Noise", "Rows", "Steps", "Compute"), lines, name="Shares of the training") + note(
        "Shares of the training's noise density, rows (images with noise), steps (with mixed batches every step trains every "
        "stage) and arithmetic."
    )


def _samples(
    config: RunConfig,
    samples: Tensor,
    real: Tensor,
    sample_classes: Sequence[str] | None,
    real_classes: Sequence[str] | None,
) -> str:
    sampling = config.sampling
    made = picture(
        grid(samples, pad=GAP, captions=sample_classes),
        f"{len(samples)} samples, not selected ({sampling.solver}, {sampling.calls} calls)",
    )
    beside = picture(grid(real, pad=GAP, captions=real_classes), f"{len(real)} real images")
    return f'<div class="pair">{made}{beside}</div>'


def _strip(folder: Path, config: RunConfig) -> str:
    """Show the same samples at some steps of the training, from its sample grids."""
    found = sorted(path for path in folder.glob("step_*.png") if path.stem[5:].isdecimal())
    if len(found) < 2 or not config.data.shape:
        return ""
    some = [found[round(i * (len(found) - 1) / (FRAMES - 1))] for i in range(FRAMES)] if len(found) > FRAMES else found
    figures = "".join(_frame(path, config.data.shape[1:]) for path in some)
    return f'<div class="pairs">{figures}</div>{note("The same samples (equal noise) while the network was trained.")}'


def _frame(path: Path, size: tuple[int, ...]) -> str:
    """Return the upper left part of a grid of samples, with the step below it."""
    picture, step = load_png(path, str(path), "remove it"), f"{int(path.stem[5:]):,}"
    across, down = (side + 1 for side in cell(*size))
    if (picture.height - 1) % down:  # with captions
        down += STRIP
    part = picture.crop((0, 0, min(3 * across + 1, picture.width), min(3 * down + 1, picture.height)))
    text = f'alt="samples after step {step}" src="{data_uri(part)}"'
    return f"<figure><img {text}><figcaption>step {step}</figcaption></figure>"


def _neighbours(neighbours: Neighbours | None) -> str:
    if neighbours is None:
        return note("Not compared yet.")
    pairs = torch.stack((neighbours.samples, neighbours.nearest), dim=1)
    figures = "".join(
        f'<figure><img alt="sample {i} and its nearest training image" '
        f'src="{data_uri(grid(pair, columns=2, pad=GAP))}"><figcaption>{distance:.3g}</figcaption></figure>'
        for i, (pair, distance) in enumerate(zip(pairs, neighbours.distances, strict=True), start=1)
    )
    words = (
        "Left a sample, right the training image nearest to it; below, their Euclidean distance (pixels in [-1, 1])."
    )
    return f'<div class="pairs">{figures}</div>{note(words)}'


def _metrics(entry: Record) -> str:
    """Tabulate one evaluation: an entry of evaluation.json."""
    result = read_result(entry)
    found = rows(result)
    with_real = any(row.real for row in found)
    heads = ["", "Samples", *(["Real images"] if with_real else []), "Settings", "Meaning"]
    lines = [[row.label, row.value, *([row.real] if with_real else []), row.settings, row.words] for row in found]
    step = f"Checkpoint of step {brief(entry['step'])}. " if "step" in entry else ""
    notes = f"{step}{features_sentence(result)} {counts_sentence(result)} Preprocessing: {result.preprocessing}."
    if with_real:
        notes += " Real images: the same figure for training images in place of the samples."
    if "ema" in entry:
        notes += f" Weights: the average of width {brief(entry['ema'])}."
    return table(heads, lines, words=len(heads) - 1, name=f"Metrics with features {result.extractor}") + note(notes)


def _origin(config: RunConfig, launches: Sequence[Record]) -> str:
    commands = "".join(
        f"<pre>{escape(launch['command'])}</pre>" + note(f"Started {launch['time']} on {launch['device']}.")
        for launch in launches
    )
    text = yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)
    details = f"<details><summary>The whole configuration</summary><pre>{escape(text)}</pre></details>"
    return (commands or note("No command was recorded.")) + details


def _interval(sigma: tuple[float, float]) -> str:
    high = "∞" if math.isinf(sigma[1]) else f"{sigma[1]:.4g}"
    return f"[{sigma[0]:.4g}, {high})"


def _count(value: int) -> str:
    """Return a number in thousands, millions or billions, with three digits."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
