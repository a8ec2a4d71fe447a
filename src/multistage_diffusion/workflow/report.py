"""Writes the HTML report of a run."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from ..data.rows import read
from ..errors import UserError
from ..evaluation import nearest_image
from ..progress import Progress
from ..reporting.describe import architecture_rows, describe
from ..rng import generator
from ..samplers.class_labels import names_of
from ..stage_finding import StageResult
from ..training.run import Run
from .sample import opened_run, require_writable, sample

NEIGHBOURS = 16  # samples shown beside their nearest training images


def report(
    run: Run | Path | str,
    *,
    checkpoint: str = "best",
    count: int = 64,
    device: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write RUN/report.html: stages, network, losses, samples, nearest neighbours, metrics, command and configuration.

    Args:
        run: a trained run, or its folder.
        checkpoint: the checkpoint whose samples are shown.
        count: number of samples shown.
        device: default CUDA when there is one.
        progress: called with (done, total).
    """
    from ..reporting.network_drawing import draw_network  # matplotlib takes a while to import
    from ..reporting.report import Neighbours, load_stages_png, write_report

    run = opened_run(run)
    config = run.config()
    require_writable(run, "report.html")
    stages_png = run.path / "stages.png"
    if stages_png.exists():
        load_stages_png(stages_png)  # before samples are drawn
    train_images, held_out = run.data().split(config.data.held_out)
    real = held_out if len(held_out) else train_images
    images = sample(run, count, checkpoint=checkpoint, in_turn=True, device=device, progress=progress)
    distance, index = nearest_image(images[:NEIGHBOURS], train_images)
    order = torch.randperm(len(real), generator=generator(("report", "real")))
    known = None if real.labels is None or not config.network.num_classes else torch.from_numpy(real.labels)
    labels = None if known is None else known[order[:count]]
    described = describe(config)
    return write_report(
        run.path,
        config=config,
        architecture=architecture_rows(described),
        samples=images,
        sample_classes=images.class_names,
        real=read(real, order[:count]),
        real_classes=names_of(config, labels),
        neighbours=Neighbours(
            samples=images[:NEIGHBOURS],
            nearest=read(train_images, index),
            distances=distance.tolist(),
        ),
        stages_png=stages_png if stages_png.exists() else None,
        found=_found(run),
        network_svg=draw_network(config.network, described, "svg").decode(),
    )


def _found(run: Run) -> StageResult | None:
    """Return the result that the run's stages are from; None if there is none, or it is of another release."""
    path = run.path / "stages.json"
    if not path.exists():
        return None
    try:
        return StageResult.load(path)
    except UserError as error:
        warnings.warn(f"{error}; the report shows stages.png instead", stacklevel=3)
        return None
