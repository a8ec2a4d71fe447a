"""Checks of a run before the work: whether it can be trained, and warnings of settings that do not suit the data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ..config import CodecConfig, NetworkConfig, RunConfig, TrainingConfig
from ..config.serialization import to_dict
from ..contracts import Codec
from ..data import ImageData
from ..errors import UserError
from ..escaping import counted
from ..latent.latents import LatentData
from ..nets.cost import network_cost
from ..nets.network import meta_network
from ..performance.offload import require_training_memory
from ..samplers import make_plan
from ..shares import row_counts, stage_shares, stage_training
from ..stage_finding import StageResult
from ..training import branching
from ..training.batches import BatchSource
from ..training.warm_start import warm_start

LEAST_SHARE = 0.02  # of the rows, for a stage
LEAST_HELD_OUT = 16  # images
LEAST_DEVIATION = 0.01  # of images that hardly differ
SAMPLED = 4096  # images whose standard deviation is compared with diffusion.sigma_data


def warn_of_network(network: NetworkConfig) -> None:
    """Warn of what the network's family says about its settings."""
    for text in network.advice():
        warnings.warn(text, stacklevel=3)


def warn_of_borrowed(config: RunConfig) -> None:
    """Warn if a preset's stages were made for other images."""
    made_for = config.stages.origin.get("data", config.data.source)
    if len(config.stages) > 1 and made_for != config.data.source:
        warnings.warn(
            f"the stages are those of {made_for}; msdiff stages finds these data's own (--stages)", stacklevel=3
        )


def warn_of_sigma_data(config: RunConfig, what: str, std: float) -> None:
    """Warn if EDM's sigma_data is far from the standard deviation of the network's input.

    Args:
        config: complete.
        what: "images" or "latents".
        std: their standard deviation as the network sees them.
    """
    if config.diffusion.precondition == "edm" and not 0.5 <= config.diffusion.sigma_data / max(std, 1e-9) <= 2.0:
        warnings.warn(
            f"diffusion.sigma_data={config.diffusion.sigma_data:g}, but the {what}' standard deviation is {std:.2g}; "
            f"consider --set diffusion.sigma_data={std:.2g}",
            stacklevel=3,
        )


def warn_of_few(training: ImageData, held_out: ImageData) -> None:
    """Warn if so few images are held out that their loss and every comparison with them say little."""
    if 0 < len(held_out) < LEAST_HELD_OUT:
        # hashes select about a share of the images: a margin of two standard deviations
        wanted = LEAST_HELD_OUT + 2 * LEAST_HELD_OUT**0.5
        share = math.ceil(100 * wanted / (len(training) + len(held_out))) / 100
        mend = f"give a larger --held-out, such as {share:.2g}" if share <= 0.5 else "more images would mend that"
        warnings.warn(
            f"{counted(len(held_out), 'image')} held out: too few for a held-out loss or an evaluation to rely on; {mend}",
            stacklevel=3,
        )


def warn_of_branching(training: TrainingConfig) -> None:
    """Warn if a training ends before its stages get decoders of their own."""
    if training.branch_at >= training.steps:
        warnings.warn(
            f"training.branch_at={training.branch_at}: all stages train one decoder to the end, step {training.steps}; set it to "
            "less for decoders of their own",
            stacklevel=3,
        )


def require_same_images(result: StageResult, data: ImageData, training: ImageData) -> None:
    """Check that stages were found on a run's images: all of them, or a part that was not held out.

    Stages of the baselines "timestep" and "snr" do not depend on images.

    Raises:
        UserError: if they were found on others.
    """
    if not result.fingerprint or result.settings.algorithm in ("timestep", "snr"):
        return
    known = {result.fingerprint, result.data_fingerprint}
    if data.fingerprint not in known and training.fingerprint not in known:
        raise UserError(
            "--stages: they were found on other images, or on these in another size; run msdiff stages on these, or give "
            "--borrow to use them all the same"
        )


def warn_of_density(config: RunConfig) -> None:
    """Warn if a run's stages were found for another training density or preconditioning than the run's."""
    origin, diffusion = config.stages.origin, config.diffusion
    if "prior" not in origin:  # the edges do not depend on it
        return
    if (origin["prior"], origin["precondition"]) != (to_dict(diffusion.prior), diffusion.precondition):
        warnings.warn(
            f"the stages were found for {origin['precondition']} and the density {_words(origin['prior'])}, but this run "
            f"trains with {diffusion.precondition} and {_words(to_dict(diffusion.prior))}; find them with msdiff stages "
            "--preset, of this run's preset, or set diffusion.prior",
            stacklevel=3,
        )


def _words(prior: Mapping[str, Any]) -> str:
    numbers = ", ".join(f"{name} {value}" for name, value in prior.items() if name not in ("kind", "schedule"))
    return f"{prior['kind']}({numbers})"


def warn_of_starved(config: RunConfig) -> None:
    """Warn of stages with less than LEAST_SHARE of the training rows."""
    trained = stage_training(config.training, config.stages, config.diffusion.prior)
    for stage, (_, share, _) in enumerate(trained):
        if share < LEAST_SHARE:
            low, high = config.stages.interval(stage)
            warnings.warn(
                f"stage {stage + 1} (sigma {low:.3g} to {high:.3g}) gets {share:.2%} of the training rows, too few for a "
                "decoder of its own; find other stages (msdiff stages --denoiser gaussian) or set training.shares "
                "or training.floor_share=0.05",
                stacklevel=3,
            )


def latent_std(latents: LatentData) -> float:
    """Return the standard deviation of at most SAMPLED latents, evenly spaced in the data."""
    sample = latents.subset(np.unique(np.linspace(0, len(latents) - 1, SAMPLED).astype(np.int64)))
    return float(sample.tensor().to(torch.float64).std(correction=0))


def sample_std(images: ImageData) -> float:
    """Return the standard deviation of a pixel in [-1, 1] about the mean image, of at most SAMPLED images.

    They are evenly spaced in the data. This is the sigma_data that is chosen where none is given (auto.py): at least
    LEAST_DEVIATION.
    """
    count, numbers = 0, np.unique(np.linspace(0, len(images) - 1, SAMPLED).astype(np.int64))
    total, squares = np.zeros(images.shape), np.zeros(images.shape)
    for part in images.subset(numbers).chunks():
        levels = part.astype(np.float64) / 127.5 - 1.0
        count += len(part)
        total += levels.sum(0)
        squares += (levels**2).sum(0)
    return max(LEAST_DEVIATION, math.sqrt(max(0.0, float((squares / count - (total / count) ** 2).mean()))))


def check(config: RunConfig, images: tuple[ImageData, ImageData], device: torch.device, processes: int = 1) -> None:
    """Check that a configuration can be trained on a data set.

    Args:
        config: complete; codec.scale may be open.
        images: training and held-out images.
        device: training device.
        processes: number of processes that train together.

    Raises:
        UserError: if anything would stop the training later: network, sampler, batch, labels, memory, decoders that
            cannot share one or the run to start from.
    """
    config.network.require_size(*config.input_shape[1:])
    cost = network_cost(config.network, *config.input_shape[1:])
    require_training_memory(config, cost.total_parameters, device, processes)
    make_plan(config.sampling, config.diffusion.schedule)
    row_counts(config.training, stage_shares(config.training, config.stages, config.diffusion.prior))
    BatchSource(config, images[0], torch.device("cpu"))
    if config.training.branch_at:
        branching.tie(meta_network(config.network))
    if config.training.init_from:
        warm_start(config.training.init_from, config)


def require_same_input(result: StageResult, config: CodecConfig, codec: Codec | None, start: str = "") -> None:
    """Check that stages were found on the input of a run's network.

    Args:
        result: the stages.
        config: the codec's configuration.
        codec: the opened codec; None for a run on pixels.
        start: the run that it starts from; empty: none.

    Raises:
        UserError: if they were found on other data: another pixel range, other latents.
    """
    if codec is None:
        if result.codec:
            raise UserError("stages: they were found on latents, but this run trains on pixels; give --codec")
        if result.data_range is None or tuple(result.data_range) != (-1.0, 1.0):
            raise UserError(
                f"stages: they were found with data_range {list(result.data_range or [])}, but networks train on "
                "[-1, 1], where their edges mean other noise; run msdiff stages without --data-range"
            )
        return
    command = f"msdiff stages DATA --run {start} --codec {config.source}" if start else "msdiff stages with --codec"
    if not result.codec:
        raise UserError(
            "stages: they were found on pixels, but this run trains on latents, where their edges mean other noise; run "
            f"{command}"
        )
    if result.codec != codec.fingerprint:
        raise UserError(
            "stages: they were found on the latents of another codec; run "
            + (command if start else "msdiff stages with this codec")
        )
    if config.factor is not None and result.scale is not None and abs(config.factor / result.scale - 1) > 1e-3:
        raise UserError(
            f"stages: they were found on latents times {result.scale:.6g}, but codec.scale={config.factor:.6g}; "
            + (f"the network starts from {start}, so run {command}" if start else "leave codec.scale out")
        )
