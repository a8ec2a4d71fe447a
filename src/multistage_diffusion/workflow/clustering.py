"""Stage finding from a trained run: noise levels whose gradients agree form a stage."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import rng
from ..config import CodecConfig
from ..data import ImageData, to_float
from ..data.rows import read
from ..errors import UserError
from ..latent.codecs import open_codec
from ..latent.latents import encode_images
from ..performance.devices import resolve_device
from ..progress import Progress
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from ..stage_finding import StageResult, StageSettings
from ..stage_finding.boundaries import Objective, optimal_partition
from ..stage_finding.edges import made_result, stage_table
from ..training.gradients import gradient_affinity
from ..training.run import Run
from .latent import recorded_scale
from .stages import GIB, save_stages


def find_stages_by_gradients(
    run: Run | Path | str,
    settings: StageSettings,
    *,
    schedule: NoiseSchedule | None = None,
    out: Path | str | None = None,
    device: str | None = None,
    memory: float = 2.0,
    progress: Progress | None = None,
) -> StageResult:
    """Find stages from the gradients of a trained run, see `gradient_stages`.

    Args:
        run: a trained run, or its folder.
        settings: algorithm "gradient", with its stages, objective and seed.
        schedule: the kernel in whose time edges are printed; None: the run's own.
        out: where to write the result as JSON, with its matrix as PNG beside it.
        device: default CUDA when there is one.
        memory: approximate GiB of gradients to keep.
        progress: called with (gradients done, gradients in total).

    Raises:
        UserError: as `gradient_stages`.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("algorithm 'gradient' is for one process; start msdiff stages without torchrun")
    run = run if isinstance(run, Run) else Run.open(run)
    config = run.config()
    schedule = schedule or config.diffusion.schedule
    measure = schedule if isinstance(schedule, VP) else VP()
    codec, objective = config.codec, settings.objective
    settings = dataclasses.replace(settings.resolved(), data_range=None if codec.used else (-1.0, 1.0))
    times, curves = gradient_stages(
        run,
        settings.stages,
        measure=measure,
        objective=objective,
        memory=int(memory * GIB),
        seed=settings.seed,
        device=device,
        progress=progress,
    )
    curves["table"] = stage_table(np.array(curves["similarity"]), curves["t"], objective, schedule, measure)
    result = made_result(
        times,
        curves,
        settings,
        schedule=schedule,
        measure=measure,
        fingerprint=config.data.fingerprint,
        codec=codec.fingerprint,
        scale=codec.factor if codec.used else None,
    )
    if out is not None:
        save_stages(result, Path(out))
    return result


def gradient_stages(
    run: Run | Path | str,
    stages: int,
    *,
    measure: VP | None = None,
    objective: Objective = "total-distance",
    rows: int = 64,
    bins: int = 40,
    batch: int = 64,
    memory: int = 2 << 30,
    seed: int = 0,
    device: str | None = None,
    progress: Progress | None = None,
) -> tuple[tuple[float, ...], dict[str, Any]]:
    """Cut time where the gradients of a trained run change direction, by algorithm 2's dynamic programming.

    The cosine of two bins' gradients is their similarity, 1 - cosine their distance. The similarity (1 + cosine) / 2,
    which lies in [0, 1], would give the same cuts: both objectives are linear in it, and the number of groups is fixed.

    Args:
        run: a trained run, or its folder; see `gradient_affinity` for suitable runs. Held-out images are used, or
            training images if none are held out.
        stages: the number n of stages.
        measure: the kernel of the times; None: the run's schedule if it is a VP, else the standard VP.
        objective: as in `optimal_partition`.
        rows: images per gradient, each at another noise level of the bin; images repeat if there are too few.
        bins: number of time bins; edges are among their borders.
        batch: rows computed at once.
        memory: approximate bytes of gradients to keep.
        seed: seed of images and noise.
        device: default CUDA when there is one.
        progress: called with (gradients done, gradients in total).

    Returns:
        The n - 1 edges in the time of `measure`, and the curves behind them: "t" (where each bin begins), the matrix
        "similarity" of the bins' cosines, "objective_value", and "steps" (of the averaged checkpoints).

    Raises:
        UserError: if the run has no checkpoint or no shared parameters, there are fewer bins than stages, or rows or
            batch is below 1.
    """
    run = run if isinstance(run, Run) else Run.open(run)
    for name, number in (("rows", rows), ("batch", batch)):
        if number < 1:
            raise UserError(f"{name}={number} must be at least 1")
    if not 1 <= stages <= bins:
        raise UserError(f"stages={stages} must be between 1 and the {bins} bins of time")
    config, resolved = run.config(), resolve_device(device)
    schedule = config.diffusion.schedule
    images, labels = _drawn(run, rows, seed)
    borders, matrix, steps = gradient_affinity(
        run,
        _as_seen(config.codec, images, resolved),
        labels.to(resolved) if labels is not None and config.network.num_classes else None,
        measure=measure or (schedule if isinstance(schedule, VP) else VP()),
        bins=bins,
        batch=batch,
        memory=memory,
        seed=seed,
        progress=progress,
    )
    similarity = matrix.numpy()
    first, value = optimal_partition(similarity, stages, objective)
    curves = {
        "t": list(borders[:-1]),
        "similarity": np.round(similarity, 6).tolist(),
        "objective_value": value,
        "steps": list(steps),
    }
    return tuple(borders[i] for i in first), curves


def _drawn(run: Run, rows: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return images in a random order, uint8 (rows, C, H, W), and their labels."""
    training, held_out = run.data().split(run.config().data.held_out)
    data: ImageData = held_out if len(held_out) else training
    order = torch.randperm(len(data), generator=rng.generator((seed, "gradient-images")))
    pick = order[torch.arange(rows) % len(data)]
    labels = None if data.labels is None else torch.from_numpy(data.labels)[pick]
    return read(data, pick), labels


def _as_seen(codec: CodecConfig, images: Tensor, device: torch.device) -> Tensor:
    """Return images, uint8 (R, C, H, W), as inputs of the network: floats in [-1, 1], or scaled latents."""
    if not codec.used:
        return to_float(images.to(device))
    scale = recorded_scale(codec)
    return encode_images(open_codec(codec, device), images, device=device).to(device) * scale
