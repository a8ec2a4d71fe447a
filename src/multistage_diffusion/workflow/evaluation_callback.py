"""Evaluation during training: logs the Fréchet distance of a run's samples, by which its best checkpoint is chosen."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import RunConfig
from ..contracts import Conditioning, Denoiser
from ..data import ImageData
from ..distributed import ALONE, World
from ..errors import UserError
from ..evaluation import (
    EXTRACT_BATCH,
    METRICS,
    FeatureExtractor,
    Reference,
    compare_samples,
    frechet_between,
    get_features,
    image_moments,
    make_reference,
    require_features,
    sharded,
    statistics_metrics,
)
from ..evaluation.reference import KEPT
from ..evaluation.registry import Need
from ..performance.devices import autocast_dtype
from ..samplers.class_labels import frequent_labels
from ..samplers.sampling import sample_images
from ..training.callbacks import Callback, Evaluated, StopRequested, between_steps
from ..training.flops import flops_per_image
from ..training.trainer import Trainer
from .references import read_reference

TRAINING_IMAGES = "training images"  # the name of the reference in records if no file was given


@dataclass(frozen=True, kw_only=True)
class FidReference:
    """The reference against which samples are measured.

    Attributes:
        extractor: feature extractor.
        reference: statistics of real images' features.
        source: origin of the reference: a file, or TRAINING_IMAGES.
        metrics: names of the metrics that are logged besides the Fréchet distance.
    """

    extractor: FeatureExtractor
    reference: Reference
    source: str
    metrics: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: RunConfig, data: ImageData, training: ImageData, device: torch.device) -> FidReference | None:
        """Return the reference that a configuration names in `evaluation`; None for a run without evaluation.

        Args:
            config: the run's configuration.
            data: its whole data set.
            training: the training part of the data set.
            device: where features are computed.

        Raises:
            UserError: if the features are unknown, do not accept such images or have too many dimensions; if a metric is
                unknown or cannot be computed; if the reference cannot be read or was made with other features or data;
                or for fewer than two training images.
        """
        settings = config.evaluation
        if not settings.every:
            return None
        extractor = _features(settings.features)
        field = f"evaluation.features={settings.features!r}"
        kept = KEPT if any("features" in _needs(name) for name in settings.metrics) else 0
        # moments are summed batch by batch
        count = kept + settings.count if settings.metrics else EXTRACT_BATCH
        require_features(field, extractor, data.shape, count, device)
        if settings.reference:
            reference, source = _read(Path(settings.reference), extractor, data, device), settings.reference
        elif len(training) < 2:
            raise UserError(
                f"evaluation.every={settings.every} needs at least 2 training images as reference, not {len(training)}; set "
                "it to 0"
            )
        else:
            source = TRAINING_IMAGES
            reference = make_reference(
                extractor,
                training,
                data=data.name,
                fingerprint=data.fingerprint,
                part="train",
                keep=kept,
                device=device,
            )
        if settings.metrics:
            with _prefixed("evaluation."):
                statistics_metrics(settings.metrics, extractor, reference, settings.count)
        return cls(extractor=extractor, reference=reference, source=source, metrics=settings.metrics)

    def distance(self, samples: Tensor, device: torch.device, world: World = ALONE) -> float:
        """Return the Fréchet distance of samples, uint8 (N, C, H, W), N >= 2, to the reference; all ranks call it."""
        moments = image_moments(sharded(self.extractor, world), samples, device=device)
        distance: float = world.broadcast_object(frechet_between(moments, self.reference.moments))
        return distance

    def values(self, samples: Tensor, device: torch.device, world: World = ALONE) -> dict[str, float]:
        """Return the values of `metrics` for samples, uint8 (N, C, H, W), by name; all ranks call it."""
        if not self.metrics:
            return {}
        extractor = sharded(self.extractor, world)
        found = compare_samples(samples, self.reference, extractor, metrics=self.metrics, device=device).metrics
        values: dict[str, float] = world.broadcast_object({name: value.value for name, value in found.items()})
        return values


def _features(name: str) -> FeatureExtractor:
    with _prefixed("evaluation."):
        return get_features(name, named=False)


def _needs(metric: str) -> frozenset[Need]:
    with _prefixed("evaluation."):
        return METRICS[metric].needs


def _read(path: Path, extractor: FeatureExtractor, data: ImageData, device: torch.device) -> Reference:
    with _prefixed("evaluation.reference: "):
        reference = read_reference(path, extractor, device)
        reference.require(extractor, data.fingerprint, data.shape)
        return reference


@contextmanager
def _prefixed(text: str) -> Iterator[None]:
    """Put text in front of the message of a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{text}{error}") from None


def _due(trainer: Trainer) -> bool:
    """Return whether an evaluation is due at the trainer's step."""
    return trainer.step % trainer.config.evaluation.every == 0 or trainer.step == trainer.config.training.steps


class EvaluationCallback(Callback[Trainer]):
    """Evaluates samples of the EMA weights every evaluation.every steps; ends training that no longer improves.

    Args:
        config: the run's configuration, completed from its data.
        reference: what samples are measured against.
        decode: maps the network's latents to images; None for a run on pixels.
        device: where samples are drawn and measured.

    Raises:
        UserError: if the run's sampler is invalid; the check draws two samples from a denoiser that returns zeros.
    """

    everywhere = True  # each rank draws and measures its share

    def __init__(
        self,
        config: RunConfig,
        reference: FidReference,
        decode: Callable[[Tensor], Tensor] | None,
        device: torch.device,
    ) -> None:
        self.reference, self.decode, self.device = reference, decode, device
        self.flops = flops_per_image(config)
        self._draw(_nothing, config, 2)

    def started(self, trainer: Trainer) -> str | None:
        """Return why a resumed run is not to go on, if its patience was exhausted before."""
        return self._stop_reason(trainer, [])

    def stepped(self, trainer: Trainer) -> Evaluated | None:
        """Evaluate if an evaluation is due and the training is not to stop; a stop that is requested meanwhile ends it."""
        return self._evaluate(trainer) if _due(trainer) else None

    def resumed(self, trainer: Trainer) -> Evaluated | None:
        """Make up for an evaluation that a stop has left out."""
        known = any(r["kind"] == "quality" and r["step"] == trainer.step for r in trainer.run.records())
        left_out = _due(trainer) and not trainer.world.broadcast_object(known)
        return self._evaluate(trainer) if left_out else None

    def _evaluate(self, trainer: Trainer) -> Evaluated | None:
        """Evaluate, unless the training is to stop."""
        if trainer.stopped:
            return None
        start = time.perf_counter()
        try:
            frechet, metrics = self._measure(trainer)
        except StopRequested:
            return None
        record = {
            "kind": "quality",
            "step": trainer.step,
            "images": trainer.images,
            "petaflops": self.flops * trainer.images / 1e15,
            "frechet": frechet,
            "metrics": metrics,
            "extractor": self.reference.extractor.name,
            "count": trainer.config.evaluation.count,
            "reference": self.reference.source,
            "seconds": time.perf_counter() - start,
        }
        return Evaluated(record=record, quality=frechet, stop_reason=self._stop_reason(trainer, [record]))

    def _measure(self, trainer: Trainer) -> tuple[float | None, dict[str, float]]:
        """Return the Fréchet distance (None: samples are not finite) and the values of further metrics."""
        try:
            samples = self._draw(trainer.averaged(), trainer.config, trainer.config.evaluation.count, trainer)
        except FloatingPointError as error:  # early in training, samples may not be finite; training continues
            warnings.warn(f"no Fréchet distance at step {trainer.step}: {error}", stacklevel=2)
            return None, {}
        distance = self.reference.distance(samples, self.device, trainer.world)
        if trainer.stopped:
            raise StopRequested
        return distance, self.reference.values(samples, self.device, trainer.world)

    def _draw(self, denoiser: Denoiser, config: RunConfig, count: int, trainer: Trainer | None = None) -> Tensor:
        return sample_images(
            denoiser,
            config.input_shape,
            count,
            config=config.sampling,
            schedule=config.diffusion.schedule,
            seed=config.evaluation.seed,
            labels=frequent_labels(config, count, config.evaluation.seed),
            device=self.device,
            decode=self.decode,
            autocast=autocast_dtype(config.training.precision, self.device),
            world=ALONE if trainer is None else trainer.world,
            progress=None if trainer is None else between_steps(trainer, "evaluating"),
        )

    def _stop_reason(self, trainer: Trainer, records: list[dict[str, Any]]) -> str:
        """Return why training ends after evaluation.patience evaluations without a new best; "" if it goes on.

        Args:
            trainer: the trainer, whose run's log holds the evaluations so far.
            records: evaluations that are not logged yet.
        """
        patience = trainer.config.evaluation.patience
        if not patience or trainer.step >= trainer.config.training.steps:
            return ""
        idle, best = trainer.world.broadcast_object(
            since_best([*trainer.run.records(), *records]) if trainer.world.is_main_process else None
        )
        if idle < patience:
            return ""
        lowest = "none" if best is None else f"none below the {best['frechet']:.4g} of step {best['step']}"
        return (
            f"{trainer.run.path}: ended by patience at step {trainer.step}: {lowest} in the last {idle} Fréchet distances; a "
            "larger evaluation.patience lets it go on (--resume)"
        )


def since_best(records: Sequence[dict[str, Any]]) -> tuple[int, dict[str, Any] | None]:
    """Return the number of evaluations after the best one, and the record of the best one.

    Args:
        records: lines of metrics.jsonl, in order. Of equal Fréchet distances the first is the best.

    Returns:
        (count, record); (number of all evaluations, None) if none has a distance.
    """
    evaluated = [record for record in records if record["kind"] == "quality"]
    known = [k for k, record in enumerate(evaluated) if record["frechet"] is not None]
    if not known:
        return len(evaluated), None
    best = min(known, key=lambda k: evaluated[k]["frechet"])
    return len(evaluated) - 1 - best, evaluated[best]


def _nothing(x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
    """Return zeros, as a denoiser."""
    return torch.zeros_like(x)
