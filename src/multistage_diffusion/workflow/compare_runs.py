"""Comparison of runs: the same images and noise for all, and their curves of quality against compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..config.sampling import SamplingConfig
from ..config.serialization import from_dict
from ..data import ImageData
from ..errors import UserError
from ..escaping import counted
from ..evaluation.compared import ComparedRun, RunsComparison
from ..evaluation.denoising_errors import bound_difference, denoising_errors, excess_shares, relative_differences
from ..optimal import OptimalDenoiser
from ..performance.devices import resolve_device
from ..progress import Progress
from ..records import read_evaluations
from ..reporting.describe import sampling_flops
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from .likelihood import network_inputs, noise_range
from .sample import opened_run

LEVELS = 24  # noise levels, evenly spaced in ln sigma
COUNT = 1000  # images, at most


def compare_runs(
    runs: Sequence[Run | Path | str],
    *,
    count: int = COUNT,
    levels: int = LEVELS,
    seed: int = 0,
    checkpoint: str = "best",
    excess: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> RunsComparison:
    """Compare runs on the same images, in the same noise: with each other, or with the least error that is possible.

    Args:
        runs: trained runs, or their folders, on the same data; the first one is the base.
        count: most images, the first ones.
        levels: number of noise levels, over the range of training noise that all runs share.
        seed: seed of the noise.
        checkpoint: "best", "latest" or a step, of all runs.
        excess: compare on training images with their optimal denoiser, which is then the base; one run suffices. On held-out
            images that denoiser is no bound.
        device: default CUDA when there is one.
        progress: called with (rows done, rows in total).

    Raises:
        UserError: if the runs cannot be compared: other data, another share held out, latents of other codecs; for an excess,
            if runs are class-conditional, or memory does not hold all training images.
    """
    opened, place = [opened_run(run) for run in runs], resolve_device(device)
    configs = [run.config() for run in opened]
    _require_comparable(opened, configs, least=1 if excess else 2)
    if count < 2 or levels < 2:
        raise UserError(f"count={count} and levels={levels} must be at least 2")
    training, held_out = opened[0].data().split(configs[0].data.held_out)
    part = training if excess else held_out
    if len(part) < 2:
        raise UserError(
            f"data.held_out={configs[0].data.held_out} leaves fewer than 2 images to compare on; more images would mend that"
        )
    images = part.subset(range(min(count, len(part))))
    data = network_inputs(configs[0], images, place)
    sigmas, found, steps = _levels(configs, levels), list[Tensor](), list[int]()
    parts, least = len(opened) + excess, None
    if excess:
        least = _least_errors(configs, training, data, sigmas, seed, place, _part(progress, 0, parts))
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
                progress=_part(progress, number + excess, parts),
            )
        )
    features, base = _features(opened), found[0] if least is None else least
    evaluated = [_evaluations(run, step, features) for run, step in zip(opened, steps, strict=True)]
    kind = _common_kind(evaluated)
    compared = [] if least is None else [_optimal(least)]
    each = zip(opened, configs, _names(opened), steps, found, evaluated, strict=True)
    for run, config, name, step, errors, entries in each:
        differences = relative_differences(errors, base) if least is None else excess_shares(errors, base)
        first = not compared
        compared.append(
            ComparedRun(
                name=name,
                step=step,
                edges=config.stages.interior,
                errors=tuple(errors.mean(1).tolist()),
                differences=() if first else differences,
                bound=None if first else bound_difference(errors, base, sigmas),
                training=_training_curve(run, features),
                sampling=_sampling_curve(config, [entry for entry in entries if _kind(entry) == kind]),
            )
        )
    return RunsComparison(
        sigmas=tuple(sigmas.tolist()), rows=len(images), excess=excess, features=features, runs=tuple(compared)
    )


def _least_errors(
    configs: Sequence[RunConfig],
    training: ImageData,
    data: Tensor,
    sigmas: Tensor,
    seed: int,
    device: torch.device,
    progress: Progress | None,
) -> Tensor:
    """Return the errors of the optimal denoiser of all training images, see `denoising_errors`.

    Raises:
        UserError: if runs are class-conditional, or mirror images in other ways, or memory does not hold the images.
    """
    if any(config.network.num_classes for config in configs):
        raise UserError(
            "network.num_classes: the least error of a class-conditional run is not known; leave out --excess"
        )
    if len({config.training.flip for config in configs}) > 1:
        raise UserError("training.flip: the runs have other training images; compare each by itself with --excess")
    everything = network_inputs(configs[0], training, device)
    if configs[0].training.flip:
        if configs[0].codec.used:
            raise UserError("training.flip=True: the latents of mirrored images are not compared; leave out --excess")
        everything = torch.cat([everything, everything.flip(-1)])
    optimal = OptimalDenoiser(everything.to(device))
    return denoising_errors(optimal, data, sigmas, seed=seed, device=device, progress=progress)


def _optimal(errors: Tensor) -> ComparedRun:
    """Return the optimal denoiser as the base of a comparison."""
    return ComparedRun(
        name="optimal denoiser",
        step=0,
        edges=(),
        errors=tuple(errors.mean(1).tolist()),
        differences=(),
        bound=None,
        training=(),
        sampling=(),
    )


def _require_comparable(runs: Sequence[Run], configs: Sequence[RunConfig], least: int) -> None:
    """Raise UserError unless there are so many runs and all have the same held-out images and inputs."""
    if len(runs) < least:
        wanted = "one" if least == 1 else "two"
        raise UserError(f"{len(runs)} {'run' if len(runs) == 1 else 'runs'} to compare: name {wanted} or more")
    first = configs[0]
    for run, config in zip(runs[1:], configs[1:], strict=True):
        if config.data.fingerprint != first.data.fingerprint:
            raise UserError(
                f"{run.path}: was trained on {_images(config)}, {runs[0].path} on {_images(first)}; compare runs on the same "
                "images in the same size, with the same labels"
            )
        for key, own, base in (
            ("data.held_out", config.data.held_out, first.data.held_out),
            ("codec.fingerprint", config.codec.fingerprint, first.codec.fingerprint),
            ("codec.scale", config.codec.scale, first.codec.scale),
        ):
            if own != base:
                raise UserError(
                    f"{run.path}: {key}={own} differs from {base} of {runs[0].path}; compare runs with the same held-out images "
                    "(and latents)"
                )


def _images(config: RunConfig) -> str:
    """Return a run's images in words: source, size and number of classes."""
    size = "x".join(map(str, config.data.shape[1:]))
    classes = f", {counted(config.network.num_classes, 'class')}" if config.network.num_classes else ""
    return f"{config.data.source} ({size}{classes})"


def _levels(configs: Sequence[RunConfig], count: int) -> Tensor:
    """Return noise levels evenly spaced in ln sigma over the training noise that all runs share, float64 (count,)."""
    ranges = [noise_range(config) for config in configs]
    low, high = max(r[0] for r in ranges), min(r[1] for r in ranges)
    if not low < high:
        raise UserError("the runs' training densities share no noise levels; there is nothing to compare")
    ends = torch.tensor([low, high], dtype=torch.float64).log()
    return torch.linspace(float(ends[0]), float(ends[1]), count, dtype=torch.float64).exp()


def _part(progress: Progress | None, number: int, parts: int) -> Progress | None:
    """Return the progress of one of several parts of equal size."""
    return None if progress is None else lambda done, total: progress(number * total + done, parts * total)


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


def _evaluations(run: Run, step: int, features: str) -> list[dict[str, Any]]:
    """Return the evaluations of the weights of a checkpoint that have a Fréchet distance on these features."""
    return [
        entry
        for entry in read_evaluations(run.path / "evaluation.json")
        if _distance(entry) is not None
        and entry.get("step") == step
        and "ema" not in entry
        and entry.get("extractor") == features
    ]


def _kind(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what must be equal for distances to be comparable: what samples are compared with, and how many images."""
    return tuple(entry.get(name) for name in ("against", "reference", "reference_count", "count"))


def _common_kind(evaluated: Sequence[Sequence[dict[str, Any]]]) -> tuple[Any, ...] | None:
    """Return the kind of evaluation that most runs have, of these the one with most images; None: there is none."""
    kinds = [{_kind(entry) for entry in entries} for entries in evaluated]
    known = set[tuple[Any, ...]]().union(*kinds)
    return max(known, key=lambda kind: (sum(kind in own for own in kinds), kind[-1] or 0), default=None)


def _sampling_curve(config: RunConfig, entries: Sequence[dict[str, Any]]) -> tuple[tuple[float, float], ...]:
    """Return (gigaFLOPs per image, Fréchet distance) of evaluations, by cost."""
    found = dict[float, float]()
    for entry in entries:
        distance = _distance(entry)
        assert distance is not None
        found[sampling_flops(config, from_dict(SamplingConfig, entry["sampling"])) / 1e9] = distance
    return tuple(sorted(found.items()))


def _distance(entry: dict[str, Any]) -> float | None:
    metrics = entry.get("metrics")
    value = metrics.get("frechet") if isinstance(metrics, dict) else None
    return value.get("value") if isinstance(value, dict) and "sampling" in entry else None
