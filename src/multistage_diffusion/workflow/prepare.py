"""Prepares a run: completes its configuration from its data, checks it, and encodes the images of a latent run."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import DataConfig, NetworkConfig, RunConfig
from ..contracts import Codec
from ..data import ImageData, to_float
from ..data.sources import located as located_source
from ..latent.latents import LatentData
from ..nets.cost import network_cost
from ..performance.offload import require_training_memory
from ..progress import Progress
from ..samplers import make_plan
from ..training.batches import BatchSource, row_counts, stage_shares
from ..training.warm_start import warm_start
from .latent import decoder, encode_parts


def prepare(config: RunConfig, data: ImageData) -> RunConfig:
    """Return a configuration completed from its data: their location, shape and fingerprint."""
    network = config.network if config.codec.used else dataclasses.replace(config.network, channels=data.shape[0])
    return dataclasses.replace(
        config,
        data=dataclasses.replace(located(config.data), fingerprint=data.fingerprint, shape=data.shape, class_counts=()),
        network=network,
    )


def warn_of_network(network: NetworkConfig) -> None:
    """Warn of what the network's family says about its settings."""
    for text in network.cautions():
        warnings.warn(text, stacklevel=3)


def warn_of_borrowed(config: RunConfig, images: ImageData) -> None:
    """Warn if the stages or sigma_data were made for other images."""
    if config.codec.used:  # neither can be checked before the latents exist
        return
    made_for = config.stages.origin.get("data", config.data.source)
    if len(config.stages) > 1 and made_for != config.data.source:
        warnings.warn(
            f"the stages are those of {made_for}; msdiff stages finds these data's own (--stages)", stacklevel=3
        )
    std = float(to_float(images.images[:4096]).std())
    if config.diffusion.precondition == "edm" and not 0.5 < config.diffusion.sigma_data / max(std, 1e-9) < 2.0:
        warnings.warn(
            f"diffusion.sigma_data={config.diffusion.sigma_data:g}, but the images' standard deviation is {std:.2g}; "
            f"consider --set diffusion.sigma_data={std:.2g}",
            stacklevel=3,
        )


def located(data: DataConfig) -> DataConfig:
    """Return data with the absolute path of their source, because a run is used from other folders too."""
    return dataclasses.replace(data, source=located_source(data.source))


def check(
    config: RunConfig, data: ImageData, device: torch.device | None = None, processes: int = 1
) -> tuple[ImageData, ImageData]:
    """Check that a configuration can be trained on a data set; return the (training, held-out) images.

    Args:
        config: complete except for latents.
        data: the images.
        device: training device; None: the CPU.
        processes: number of processes that train together.

    Raises:
        UserError: if anything would stop the training later: network, sampler, batch, labels, held-out share, memory or
            the run to start from.
    """
    config.network.require_size(*config.input_shape[1:])
    cost = network_cost(config.network, *config.input_shape[1:])
    require_training_memory(config, cost.total_parameters, device or torch.device("cpu"), processes)
    make_plan(config.sampling, config.diffusion.schedule)
    row_counts(config.training, stage_shares(config.training, config.stages, config.diffusion.prior))
    parts = data.split(config.data.held_out)
    BatchSource(config, parts[0], torch.device("cpu"))
    if config.training.init_from:
        warm_start(config.training.init_from, config)
    return parts


def with_paths(config: RunConfig) -> RunConfig:
    """Return a configuration with absolute paths of the run to start from and of the evaluation reference."""
    training, evaluation = config.training, config.evaluation
    return dataclasses.replace(
        config,
        training=dataclasses.replace(training, init_from=_absolute(training.init_from)),
        evaluation=dataclasses.replace(evaluation, reference=_absolute(evaluation.reference)),
    )


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve()) if path else ""


@dataclass(frozen=True, kw_only=True)
class PreparedRun:
    """The input of a trainer: training and held-out images, or latents with the function that decodes them."""

    config: RunConfig
    parts: tuple[ImageData, ImageData] | tuple[LatentData, LatentData]
    decode: Callable[[Tensor], Tensor] | None = None

    @classmethod
    def of(
        cls,
        config: RunConfig,
        codec: Codec | None,
        parts: tuple[ImageData, ImageData],
        device: torch.device,
        progress: Progress | None,
    ) -> PreparedRun:
        """Encode the images of a run with a codec; a run on pixels uses them unchanged."""
        if codec is None:
            return cls(config=config, parts=parts)
        config, latents = encode_parts(config, codec, parts, device, progress)
        assert config.codec.scale is not None
        return cls(config=config, parts=latents, decode=decoder(codec, config.codec.scale))
