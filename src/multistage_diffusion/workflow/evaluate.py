"""Evaluation of a run's samples: beside held-out images, or against the statistics of a reference set."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import DataConfig, RunConfig, SamplingConfig
from ..config.sampling import changed_sampler
from ..config.serialization import to_dict
from ..data import ImageData
from ..data.sources import open_configured
from ..distributed import is_main_process
from ..errors import UserError, explained, require
from ..evaluation import (
    EvaluationResult,
    FeatureExtractor,
    Reference,
    compare_samples,
    evaluate_samples,
    get_features,
    held_out_metrics,
    require_features,
    save_reference,
    sharded,
    statistics_metrics,
)
from ..evaluation.measuring import needed
from ..evaluation.reference import KEPT
from ..evaluation.result import read_result
from ..files import write_json
from ..performance.devices import joined, resolve_device
from ..progress import Progress
from ..records import read_evaluations
from ..samplers.class_labels import warn_of_empty
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from .latent import reconstruct
from .references import is_batch, part_reference, read_reference
from .sample import opened_run, require_writable, sample, sample_labels


class NotSavedError(UserError):
    """A result could not be added to RUN/evaluation.json.

    Attributes:
        result: the result.
    """

    def __init__(self, message: str, result: EvaluationResult) -> None:
        super().__init__(message)
        self.result = result


MOST_SAMPLES = 50_000  # as in published FIDs
# the mark, in evaluation.json, of `evaluate` without other data, metrics, average, sampler or seed
DEFAULTS = {"defaults": True}
PARTS = ("all", "train", "held-out")


def evaluate(
    run: Run | Path | str,
    data: DataConfig | None = None,
    *,
    count: int | None = None,
    features: str | None = None,
    weights: Path | None = None,
    metrics: Sequence[str] = (),
    seed: int = 0,
    checkpoint: str = "best",
    ema: float | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Compare samples of a run with held-out images and add the result to RUN/evaluation.json.

    The same number of real images is measured in the same way, for comparison.

    Args:
        run: a trained run, or its folder.
        data: data to compare with instead of the run's own; their training part replaces the run's training images.
        count: samples drawn; default as many as held-out images, but at least 500 and at most 5000.
        features: name of a feature extractor, or a TorchScript file; None: the run's evaluation.features.
        weights: a file of the features' weights; default: downloaded.
        metrics: names of metrics; default: all that can be computed.
        seed: seed of the samples.
        checkpoint: "best", "latest" or a step.
        ema: width of another average of the weights, see `sample`.
        sampling: another sampler than the run's own, or changes to it, see `sample`.
        device: default CUDA when there is one.
        progress: called with (done, total).

    Raises:
        UserError: if there are too few images, or data and run differ in shape, or nothing can be written in the run.
        NotSavedError: with the result, if it could not be added to RUN/evaluation.json.
    """
    run, (world, resolved) = opened_run(run), joined(device, "evaluate")
    read_evaluations(require_writable(run, "evaluation.json"))
    with world.report_failures():
        features, extractor = _features(run, features, weights)
        config, opened, share = run.config(), *_compared_data(run, data)
        sampler = changed_sampler(config.sampling, sampling)
        warn_of_empty(config.data.class_counts, config.data.class_names)
        train, held_out = opened.split(share)
        count = min(max(len(held_out), 500), 5000) if count is None else count
        require(count > 0, f"count={count} must be positive")
        # the three sets: samples, training and held-out images
        require_features(f"features={features!r}", extractor, opened.shape, count, resolved, sets=3)
        chosen = held_out_metrics(
            metrics,
            extractor,
            {"samples": count, "train": len(train), "held-out": len(held_out)},
            labels=bool(config.network.num_classes) and opened.labels is not None,
            reconstructed=config.codec.used,
        )
        step = checkpoint_step(run.checkpoint(checkpoint))  # fixed here: best may change while the run trains
        images = sample(
            run, count, seed=seed, sampling=sampler, checkpoint=str(step), ema=ema, device=device, progress=progress
        )
        result = evaluate_samples(
            images,
            train,
            held_out,
            sharded(extractor, world),
            metrics=tuple(chosen),
            labels=_labels(config, count, seed, train, held_out) if "labels" in needed(chosen) else None,
            reconstructed=reconstruct(config, held_out, resolved) if config.codec.used else None,
            device=resolved,
            progress=progress,
        )
        made = _made(step, ema, data or config.data, sampler, seed)
        asked = (data, weights, ema, sampling, *metrics)
        _save(run, result, {**made, **({} if any(one is not None for one in asked) or seed else DEFAULTS)})
        return result


def _features(run: Run, features: str | None, weights: Path | None) -> tuple[str, FeatureExtractor]:
    """Return the features that the user names, or else the run's: their name and the extractor."""
    name = run.config().evaluation.features if features is None else features
    return name, get_features(name, weights, named=features is not None)


def _labels(config: RunConfig, count: int, seed: int, *parts: ImageData) -> tuple[Tensor, ...]:
    """Return the class labels of a class-conditional run's samples and of labelled real images."""
    samples = sample_labels(config, count, seed=seed)
    assert samples is not None
    return samples, *(torch.from_numpy(part.labels) for part in parts)


def compare(
    run: Run | Path | str,
    reference: Path | str = "train",
    data: DataConfig | None = None,
    *,
    count: int | None = None,
    features: str | None = None,
    weights: Path | None = None,
    metrics: Sequence[str] = (),
    seed: int = 0,
    checkpoint: str = "best",
    ema: float | None = None,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Compare samples of a run with the statistics of a whole reference set, as published FIDs are computed.

    The result is added to RUN/evaluation.json.

    Args:
        run: a trained run, or its folder.
        reference: "train" (all training images), or a file: of statistics (`statistics`), or a batch of images (.npz).
        data: data to use instead of the run's own, for "train".
        count: samples drawn; default as many as the reference has images, but at least 500 and at most 50,000.
        features, weights, metrics, seed, checkpoint, ema, sampling, device, progress: see `evaluate`.

    Raises:
        UserError: if there are too few samples or images, the reference is of other images or features, or nothing can
            be written in the run.
        NotSavedError: with the result, if it could not be added to RUN/evaluation.json.
    """
    run, (world, resolved) = opened_run(run), joined(device, "evaluate --against")
    read_evaluations(require_writable(run, "evaluation.json"))
    with world.report_failures():
        features, own = _features(run, features, weights)
        extractor = sharded(own, world)
        opened, share = _compared_data(run, data)
        config = run.config()
        sampler = changed_sampler(config.sampling, sampling)
        warn_of_empty(config.data.class_counts, config.data.class_names)
        if str(reference) == "train":
            found = part_reference(extractor, opened, "train", share, KEPT, resolved, progress)
        else:
            found = read_reference(Path(reference), extractor, resolved, progress)
            found.require(extractor, opened.fingerprint, opened.shape)
        count = min(max(found.moments.count or MOST_SAMPLES, 500), MOST_SAMPLES) if count is None else count
        chosen = statistics_metrics(metrics, extractor, found, count)
        require_features(f"features={features!r}", extractor, opened.shape, count, resolved)
        step = checkpoint_step(run.checkpoint(checkpoint))
        images = sample(
            run, count, seed=seed, sampling=sampler, checkpoint=str(step), ema=ema, device=device, progress=progress
        )
        result = compare_samples(images, found, extractor, metrics=tuple(chosen), device=resolved)
        _save(run, result, _made(step, ema, data or config.data, sampler, seed))
        return result


def _compared_data(run: Run, data: DataConfig | None) -> tuple[ImageData, float]:
    """Open the images that a run's samples are compared with; return them and the share held out."""
    config = run.config()
    opened = run.data() if data is None else open_configured(data)
    if opened.shape != config.data.shape:
        found, own = (" x ".join(map(str, shape)) for shape in (opened.shape, config.data.shape))
        raise UserError(
            f"data: images of {found} (channels x height x width), but those of {run.path} are {own}; give --size H W --fit "
            "crop for another size, or convert them to as many channels"
        )
    share = (data or config.data).held_out
    if share != config.data.held_out and opened.fingerprint == config.data.fingerprint:
        raise UserError(
            f"data.held_out={share}: {run.path} was trained on these data with {config.data.held_out}; use {config.data.held_out}"
        )
    return opened, share


def _save(run: Run, result: EvaluationResult, made: Mapping[str, Any]) -> None:
    """Add a result to RUN/evaluation.json on the main process."""
    if not is_main_process():
        return
    file = run.path / "evaluation.json"
    try:
        write_json(file, [*read_evaluations(file), {**made, **to_dict(result)}])
    except (UserError, OSError) as error:
        line = explained(error)
        if line is None:
            raise
        raise NotSavedError(f"the result was not saved: {line}", result) from None


def _made(step: int, ema: float | None, data: DataConfig, sampling: SamplingConfig, seed: int) -> dict[str, Any]:
    """Return what RUN/evaluation.json says of how samples were drawn, and of the images that they are compared with."""
    return {
        "step": step,
        **({} if ema is None else {"ema": ema}),
        "data": data.source,
        "sampling": to_dict(sampling),
        "sampling_seed": seed,
    }


def evaluated(run: Run, *, count: int, features: str) -> EvaluationResult | None:
    """Return the kept result of `evaluate` of the best checkpoint, with this many samples and its defaults; None without one."""
    step = checkpoint_step(run.checkpoint("best"))
    own = {**DEFAULTS, "step": step, "extractor": get_features(features).name, "samples": count}
    kept = [entry for entry in read_evaluations(run.path / "evaluation.json") if own.items() <= entry.items()]
    return read_result(kept[-1]) if kept else None


def statistics(
    data: DataConfig | str,
    out: Path | str,
    *,
    features: str = "pixels",
    weights: Path | None = None,
    part: str | None = None,
    keep: int | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> Reference:
    """Write the statistics of a data set's features, for reuse in many evaluations.

    Args:
        data: where the images are, and how they are read.
        out: the .npz file.
        features: name of a feature extractor, or a TorchScript file.
        weights: a file of the features' weights; default: downloaded.
        part: "all", "train" or "held-out" images. None: "train", or "all" of an .npz file: such a file is a batch of
            reference images, with which samples of any run of the same size can be compared.
        keep: number of images whose features are kept as well, for precision, recall and KID. None: 10,000, or all of an
            .npz file.
        device: default CUDA when there is one.
        progress: called with (images done, images in total).

    Raises:
        UserError: for an unknown part or features, missing weights, a negative keep, or fewer than 2 images.
    """
    config = DataConfig(source=data) if isinstance(data, str) else data
    batch = part is None and is_batch(Path(config.source))
    part = part or ("all" if batch else "train")
    if part not in PARTS:
        raise UserError(f"part={part!r} must be one of {', '.join(PARTS)}")
    if keep is not None and keep < 0:
        raise UserError(f"keep={keep} must be >= 0")
    extractor = get_features(features, weights)
    opened, resolved = open_configured(config), resolve_device(device)
    kept = (len(opened) if batch else KEPT) if keep is None else keep
    require_features(f"features={features!r}", extractor, opened.shape, min(kept, len(opened)), resolved)
    reference = part_reference(extractor, opened, part, config.held_out, kept, resolved, progress)
    if batch:
        reference = dataclasses.replace(reference, fingerprint=None)  # of no run's data: nothing to compare it with
    save_reference(reference, Path(out))
    return reference
