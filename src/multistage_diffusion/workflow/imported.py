"""What all imports share: settings of a run that has no data yet, and its first checkpoint."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import DataConfig, NetworkConfig, RunConfig, SamplingConfig, TrainingConfig
from ..config.serialization import from_dict, read_json, to_dict
from ..errors import UserError
from ..files import write_json
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


@dataclass(frozen=True, kw_only=True)
class OwnSampler:
    """The sampler that an imported model has in the pipeline that it comes from.

    Attributes:
        scheduler: the class of diffusers.
        sampling: the same sampler here; None: none makes its steps.
    """

    scheduler: str
    sampling: SamplingConfig | None

    def options(self, used: SamplingConfig) -> str:
        """Return the options of msdiff sample that make this sampler of a run's; empty if it is the run's, or none is here."""
        if self.sampling is None:
            return ""
        own, other = to_dict(self.sampling), to_dict(used)
        return " ".join(f"--{name.replace('_', '-')} {own[name]}" for name in own if own[name] != other[name])

    def sentence(self, run: Path, own: SamplingConfig, used: SamplingConfig | None = None) -> str:
        """Return a line on whether a sampler is that of the model's pipeline, and how to get that one.

        Args:
            run: the run's folder.
            own: the run's sampler.
            used: another one that is used; None: the run's.
        """
        if self.sampling is None:
            return f"the model's own sampler is {self.scheduler}, whose steps no solver here makes: samples differ from those"
        if self.sampling == (used or own):
            return f"that is the model's own sampler, {self.scheduler}"
        options = self.options(own)
        return f"the model's own sampler is {self.scheduler}: msdiff sample {run}{options and f' {options}'}"


def write_own_sampler(run: Run, file: str, found: OwnSampler | None) -> None:
    """Write from which file or folder a run was imported, and the sampler that the model has there; None: it is not known."""
    own = None if found is None else found.sampling
    said = {} if found is None else {"scheduler": found.scheduler, SAMPLING: None if own is None else to_dict(own)}
    write_json(run.imported_file, {"file": file, **said})


def read_own_sampler(run: Run) -> OwnSampler | None:
    """Return the sampler that an imported run's model has where it comes from; None if that is not known.

    A record of another release is no error: it only informs.
    """
    if not run.imported_file.is_file():
        return None
    try:
        said = read_json(run.imported_file)
        own = said.get(SAMPLING) if isinstance(said, dict) else None
        sampling = None if own is None else from_dict(SamplingConfig, own, SAMPLING)
    except UserError:
        return None
    scheduler = said.get("scheduler") if isinstance(said, dict) else None
    return OwnSampler(scheduler=scheduler, sampling=sampling) if isinstance(scheduler, str) else None


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
