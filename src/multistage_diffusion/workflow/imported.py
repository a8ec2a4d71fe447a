"""What all imports share: settings of a run that has no data yet, and its first checkpoint."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ..config import DataConfig, NetworkConfig, RunConfig, SamplingConfig, TrainingConfig
from ..config.serialization import from_dict
from ..errors import UserError
from ..interop.parts import SAMPLING, Tensors
from ..training.checkpoint import Checkpoint, save_checkpoint
from ..training.metrics import MetricAccumulator
from ..training.run import Run
from .exchange import PREFIX


def data_without_source(data: DataConfig, shape: tuple[int, int, int]) -> DataConfig:
    """Return the data configuration of a run whose data are not known yet."""
    if data.size not in (None, shape[1:]):
        data = dataclasses.replace(data, size=None, fit="exact")
    return dataclasses.replace(data, source="", fingerprint="", shape=shape)


def continued_training(training: TrainingConfig, network: NetworkConfig) -> TrainingConfig:
    """Return training settings that fit the network's number of stages and continue an existing EMA."""
    stages = len(network.decoder_widths)
    fitting: dict[str, Any] = {
        name: default
        for name, default in (("shares", "uniform"), ("weights", "prior"))
        if isinstance(value := getattr(training, name), tuple) and len(value) != stages
    }
    if not network.augment_dim:
        fitting["augment"] = 0.0
    return dataclasses.replace(training, init_from="", freeze="nothing", ema_rampup=0.0, **fitting)


def remembered_sampling(arguments: Mapping[str, Any], base: SamplingConfig) -> SamplingConfig:
    """Return the sampler that an exported run had; base's if the file does not tell."""
    said = arguments.get(SAMPLING)
    if not isinstance(said, dict):
        return base
    try:
        return from_dict(SamplingConfig, said, SAMPLING)
    except UserError as error:  # of a later release, or with a solver that is not registered here
        warnings.warn(f"the sampling settings of the file are left out: {error}", stacklevel=4)
        return base


def save_first_checkpoint(run: Run, config: RunConfig, *, model: Tensors, ema: Tensors) -> None:
    """Write the checkpoint that a trainer resumes from: step 0, a new optimizer.

    Raises:
        UserError: if a weight is not finite.
    """
    for part in (model, ema):
        for name, value in part.items():
            if not value.isfinite().all():
                raise UserError(
                    f"weights of {name} are not finite: the file is that of a training that diverged, or of numbers too large "
                    "for its precision"
                )
    state = {
        "step": 0,
        "images": 0,
        "score": None,
        "sums": dataclasses.asdict(MetricAccumulator(len(config.stages))),
        "scaler": {},
        "config": config,
    }
    weights, average = ({f"{PREFIX}{name}": value for name, value in part.items()} for part in (model, ema))
    save_checkpoint(run.checkpoints, Checkpoint(model=weights, ema=average, optimizer={}, state=state))
