"""Comparison of runs: the same held-out images and noise for all, and their curves of quality against compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..config.sampling import SamplingConfig
from ..config.serialization import from_dict
from ..errors import UserError
from ..evaluation.compared import ComparedRun, RunsComparison
from ..evaluation.denoising_errors import bound_difference, denoising_errors, relative_differences
from ..performance.devices import resolve_device
from ..progress import Progress
from ..records import read_evaluations
from ..reporting.describe import sampling_flops
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from .likelihood import network_inputs, noise_range
from .sample import opened_run

LEVELS = 24  # noise levels, evenly spaced in ln sigma
COUNT = 1000  # held-out images, at most


def compare_runs(
    runs: Sequence[Run | Path | str],
    *,
    count: int = COUNT,
    levels: int = LEVELS,
    seed: int = 0,
    checkpoint: str = "best",
    device: str | None = None,
    progress: Progress | None = None,
) -> RunsComparison:
    """Compare runs on the same held-out images, in the same noise.

    Args:
        runs: trained runs, or their folders, on the same data; the first one is the base.
        count: most held-out images, the first ones.
        levels: number of noise levels, over the range of training noise that all runs share.
        seed: seed of the noise.
        checkpoint: "best", "latest" or a step, of all runs.
        device: default CUDA when there is one.
        progress: called with (rows done, rows in total).

    Raises:
        UserError: if the runs cannot be compared: other data, another share held out, latents of other codecs.
    """
    opened, place = [opened_run(run) for run in runs], resolve_device(device)
    configs = [run.config() for run in opened]
    _require_comparable(opened, configs)
    if count < 2 or levels < 2:
        raise UserError(f"count={count} and levels={levels} must be at least 2")
    _, held_out = opened[0].data().split(configs[0].data.held_out)
    if len(held_out) < 2:
        raise UserError(f"data.held_out={configs[0].data.held_out} leaves fewer than 2 images to compare on")
    images = held_out.subset(range(min(count, len(held_out))))
    data = network_inputs(configs[0], images, place)
    sigmas, found, steps = _levels(configs, levels), list[Tensor](), list[int]()
    for number, (run, config) in enumerate(zip(opened, configs, strict=True)):
        steps.append(checkpoint_step(run.checkpoint(checkpoint)))
        labelled = config.network.num_classes > 0 and images.labels is not None
        found.append(
            denoising_errors(
                run.denoiser(str(steps[-1]), device=place),
                data,
                sigmas,
                labels=torch.from_numpy(images.labels) if labelled else None,
                seed=seed,
                device=place,
                progress=None if progress is None else _part(progress, number, len(opened)),
            )
        )
    features = _features(opened)
    return RunsComparison(
        sigmas=tuple(sigmas.tolist()),
        rows=len(images),
        features=features,
        runs=tuple(
            ComparedRun(
                name=name,
                step=step,
                edges=config.stages.interior,
                errors=tuple(errors.mean(1).tolist()),
                differences=relative_differences(errors, found[0]) if number else (),
                bound=bound_difference(errors, found[0], sigmas) if number else None,
                training=_training_curve(run, features),
                sampling=_sampling_curve(run, config, step, features),
            )
            for number, (run, config, name, step, errors) in enumerate(
                zip(opened, configs, _names(opened), steps, found, strict=True)
            )
        ),
    )


def _require_comparable(runs: Sequence[Run], configs: Sequence[RunConfig]) -> None:
    """Raise UserError unless all runs have the same held-out images and inputs."""
    if len(runs) < 2:
        raise UserError(f"{len(runs)} run to compare: name two or more")
    first = configs[0]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        for key, own, base in (
            ("data.fingerprint", config.data.fingerprint, first.data.fingerprint),
            ("data.held_out", config.data.held_out, first.data.held_out),
            ("codec.fingerprint", config.codec.fingerprint, first.codec.fingerprint),
            ("codec.scale", config.codec.scale, first.codec.scale),
        ):
            if own != base:
                raise UserError(
                    f"{run.path}: {key}={own} differs from {base} of {runs[0].path}; compare runs on the same images"
                )


def _levels(configs: Sequence[RunConfig], count: int) -> Tensor:
    """Return noise levels evenly spaced in ln sigma over the training noise that all runs share, float64 (count,)."""
    ranges = [noise_range(config) for config in configs]
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if not low < high:
        raise UserError("the runs' training densities share no noise levels; there is nothing to compare")
    ends = torch.tensor([low, high], dtype=torch.float64).log()
    return torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64).exp()


def _part(progress: Progress, number: int, parts: int) -> Progress:
    """Return the progress of one of several parts of equal size."""
    return lambda done, total: progress(number * total + done, parts * total)


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the names of the folders, or their paths where names repeat."""
    names = [run.path.resolve().name for run in runs]
    return [name if names.count(name) == 1 else str(run.path) for name, run in zip(names, runs, strict=True)]


def _features(runs: Sequence[Run]) -> str:
    """Return the features that the most evaluations while training have in common; "" if there are none."""
    found = [record["extractor"] for run in runs for record in run.records() if record["kind"] == "quality"]
    return max(set(found), key=found.count) if found else ""


def _training_curve(run: Run, features: str) -> tuple[tuple[float, float], ...]:
    return tuple(
        (record["petaflops"], record["frechet"])
        for record in run.records()
        if record["kind"] == "quality" and record["frechet"] is not None and record["extractor"] == features
    )


def _sampling_curve(run: Run, config: RunConfig, step: int, features: str) -> tuple[tuple[float, float], ...]:
    """Return (gigaFLOPs per image, Fréchet distance) of a checkpoint's evaluations, by cost."""
    found = dict[float, float]()
    for entry in read_evaluations(run.path / "evaluation.json"):
        distance = _distance(entry)
        if distance is not None and entry.get("step") == step and entry.get("extractor") == features:
            found[sampling_flops(config, from_dict(SamplingConfig, entry["sampling"])) / 1e9] = distance
    return tuple(sorted(found.items()))


def _distance(entry: dict[str, Any]) -> float | None:
    metrics = entry.get("metrics")
    value = metrics.get("frechet") if isinstance(metrics, dict) else None
    return value.get("value") if isinstance(value, dict) and "sampling" in entry else None
