"""The likelihood of held-out images under a run: the variational bound, stage by stage."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..config import RunConfig
from ..config.serialization import to_dict
from ..data import ImageData, to_float
from ..errors import UserError
from ..evaluation.likelihood import LikelihoodResult, likelihood
from ..files import write_json
from ..latent.codecs import open_codec
from ..latent.latents import cached_latents
from ..performance.devices import joined
from ..progress import Progress
from ..records import read_evaluations
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from .latent import recorded_scale
from .sample import opened_run, require_writable

_TAIL = 1e-3  # share of the training noise beyond each end of the default range
_ROUNDING = 1e-4


def measure_likelihood(
    run: Run | Path | str,
    *,
    count: int | None = None,
    draws: int = 8,
    seed: int = 0,
    sigma_min: float | None = None,
    sigma_max: float | None = None,
    checkpoint: str = "best",
    ema: float | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> LikelihoodResult:
    """Estimate the variational bound of a run's held-out images and add it to RUN/likelihood.json.

    Args:
        run: a trained run, or its folder.
        count: held-out images, the first ones; default all of them.
        draws: noise levels per image and stage.
        seed: seed of levels and noise.
        sigma_min, sigma_max: range of the integral; default `noise_range`. Only runs on the same range are comparable.
        checkpoint: "best", "latest" or a step; its averaged weights are measured.
        ema: width of another average of the weights, see `sample`.
        device: default CUDA when there is one.
        progress: called with (rows done, rows in total).

    Returns:
        Bits per dimension for pixels; nats per dimension for latents, without the reconstruction term.

    Raises:
        UserError: for several processes, too few held-out images, or a range beyond the training noise.
    """
    run, (world, resolved) = opened_run(run), joined(device, "evaluate --likelihood")
    if world.size > 1:
        raise UserError(
            f"WORLD_SIZE={world.size}: the likelihood is computed by one process; start it without torchrun"
        )
    file = require_writable(run, "likelihood.json")
    read_evaluations(file)
    if count is not None and count < 1:
        raise UserError(f"count={count} must be at least 1")
    config = run.config()
    _, held_out = run.data().split(config.data.held_out)
    if len(held_out) < 2:
        raise UserError(
            f"data.held_out={config.data.held_out} gives {len(held_out)} held-out images; the bound needs at least 2; train with "
            "a larger share"
        )
    chosen = held_out.subset(range(min(count or len(held_out), len(held_out))))
    low, high = _range(config, sigma_min, sigma_max)
    step = checkpoint_step(run.checkpoint(checkpoint))
    result = likelihood(
        run.denoiser(str(step), "ema" if ema is None else ema, device=resolved),
        network_inputs(config, chosen, resolved),
        config.stages,
        low,
        high,
        pixels=not config.codec.used,
        labels=torch.from_numpy(chosen.labels) if config.network.num_classes and chosen.labels is not None else None,
        draws=draws,
        seed=seed,
        device=resolved,
        progress=progress,
    ).result()
    made = {"step": step, **({} if ema is None else {"ema": ema})}
    write_json(file, [*read_evaluations(file), {**made, "seed": seed, **to_dict(result)}])
    return result


def noise_range(config: RunConfig, tail: float = _TAIL) -> tuple[float, float]:
    """Return the range of a run's training noise, without a share `tail` at each end."""
    low, high = config.diffusion.prior.sample(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return low, high


def _range(config: RunConfig, sigma_min: float | None, sigma_max: float | None) -> tuple[float, float]:
    low, high = noise_range(config)
    low, high = low if sigma_min is None else sigma_min, high if sigma_max is None else sigma_max
    least, most = noise_range(config, 1e-6)
    if low < least * (1 - _ROUNDING) or high > most * (1 + _ROUNDING):
        raise UserError(
            f"sigma range [{low:.4g}, {high:.4g}] exceeds the training noise [{least:.4g}, {most:.4g}]; choose a range inside "
            "it (--sigma-range)"
        )
    return low, high


def network_inputs(config: RunConfig, images: ImageData, device: torch.device) -> Tensor:
    """Return the network's inputs for clean images: pixels in [-1, 1], or latents times the run's scale."""
    if not config.codec.used:
        return to_float(images.tensor())
    scale = recorded_scale(config.codec)
    latents, _ = cached_latents(open_codec(config.codec, device), images, scale=scale, device=device)
    return latents.tensor()
