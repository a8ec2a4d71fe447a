"""The variational bound on the likelihood of images, per stage, in bits per dimension.

In continuous time the diffusion term of the bound is an integral over the noise level (Kingma et al. 2021, "Variational
diffusion models", eq. 15). With unscaled x = y + sigma n and log-SNR -2 ln sigma it is, per dimension and in nats,

    integral of MSE(sigma) / sigma² d(ln sigma),   MSE(sigma) = E |y - D(x; sigma)|² / d,

so it is a sum over stages. The other terms are the prior term E |y|² / (2 d sigma_max²) and the reconstruction term,
the negative log-probability of a pixel's level given z = y + sigma_min n.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import Conditioning, Denoiser
from ..errors import UserError
from ..progress import Progress
from ..rng import normal, uniform
from ..stages import Stages

LEVELS = 256  # levels of a uint8 pixel, mapped to [-1, 1]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over rows and its standard error, in the `unit` of the result."""

    mean: float
    error: float

    @classmethod
    def of(cls, rows: Tensor) -> Estimate:
        """Return the estimate of values (N,), one per row, N >= 2."""
        return cls(mean=float(rows.mean()), error=float(rows.std() / math.sqrt(len(rows))))


@dataclass(frozen=True, kw_only=True)
class LikelihoodResult:
    """The bound and its terms.

    Attributes:
        unit: "bits/dim" for pixels; "nats/dim" for latents, which have no levels and thus no reconstruction term.
        sigma_min, sigma_max: range of the integral.
        rows, draws: number of images, and of noise levels per image and stage.
        numbers: stage numbers, starting at 1 for the lowest noise; stages outside the range are omitted.
        intervals: [low, high] in sigma of each stage, clipped to the range.
        stages: diffusion term of each stage.
        diffusion: sum over the stages.
        prior, reconstruction: the other terms.
        total: sum of all terms.
    """

    unit: str
    sigma_min: float
    sigma_max: float
    rows: int
    draws: int
    numbers: tuple[int, ...]
    intervals: tuple[tuple[float, float], ...]
    stages: tuple[Estimate, ...]
    diffusion: Estimate
    prior: Estimate
    reconstruction: Estimate | None
    total: Estimate


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """All terms for each row, in nats per dimension, float64; used to compare two runs row by row.

    Attributes:
        sigma_min, sigma_max, draws, numbers, intervals: as in LikelihoodResult.
        stages: (stages, N).
        prior: (N,).
        reconstruction: (N,), or None for latents.
    """

    sigma_min: float
    sigma_max: float
    draws: int
    numbers: tuple[int, ...]
    intervals: tuple[tuple[float, float], ...]
    stages: Tensor
    prior: Tensor
    reconstruction: Tensor | None

    @property
    def total(self) -> Tensor:
        """Sum of all terms, (N,)."""
        whole = self.stages.sum(0) + self.prior
        return whole if self.reconstruction is None else whole + self.reconstruction

    def result(self) -> LikelihoodResult:
        """Return means over rows with standard errors, in bits for pixels, in nats for latents."""
        pixels = self.reconstruction is not None
        unit = 1 / math.log(2) if pixels else 1.0
        return LikelihoodResult(
            unit="bits/dim" if pixels else "nats/dim",
            sigma_min=self.sigma_min,
            sigma_max=self.sigma_max,
            rows=len(self.prior),
            draws=self.draws,
            numbers=self.numbers,
            intervals=self.intervals,
            stages=tuple(Estimate.of(unit * rows) for rows in self.stages),
            diffusion=Estimate.of(unit * self.stages.sum(0)),
            prior=Estimate.of(unit * self.prior),
            reconstruction=None if self.reconstruction is None else Estimate.of(unit * self.reconstruction),
            total=Estimate.of(unit * self.total),
        )


@torch.no_grad()
def likelihood(
    denoiser: Denoiser,
    data: Tensor,
    stages: Stages,
    sigma_min: float,
    sigma_max: float,
    *,
    pixels: bool = True,
    labels: Tensor | None = None,
    draws: int = 8,
    seed: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Likelihood:
    """Estimate all terms of the bound for each row.

    ln sigma is stratified: each stage's interval has `draws` equal parts, and each row draws one level in each part.
    Noise and levels depend only on (seed, stage, row, draw), so denoisers with the same stages are compared on the same
    noise and levels.

    Args:
        denoiser: any Denoiser.
        data: (N, ...) floating point, N >= 2: pixels in [-1, 1], or latents times the run's scale.
        stages: the stages into which the integral is divided.
        sigma_min, sigma_max: range of the integral, inside the range of training noise.
        pixels: whether data are uint8 pixels mapped to [-1, 1]; if not, there is no reconstruction term.
        labels: class labels int64 (N,) for the denoiser, or None.
        draws: noise levels per row and stage.
        seed: seed of levels and noise.
        batch: rows per denoiser call.
        device: where the denoiser runs.
        progress: called with (denoiser evaluations done, total), where one evaluation is one row at one level.

    Raises:
        UserError: if the range is empty or not finite, or there are too few rows or draws.
    """
    if not 0 < sigma_min < sigma_max < math.inf:
        raise UserError(f"likelihood: sigma_min={sigma_min:g} and sigma_max={sigma_max:g} must be 0 < min < max < inf")
    if len(data) < 2 or draws < 1:
        raise UserError(f"likelihood: {len(data)} images and draws={draws}: at least 2 images and 1 draw are needed")
    intervals = clipped_intervals(stages, sigma_min, sigma_max)
    found = torch.zeros(len(intervals), len(data), dtype=torch.float64)
    total, done = len(intervals) * draws * len(data), 0
    for (place, (stage, interval)), draw in itertools.product(enumerate(intervals.items()), range(draws)):
        for rows in torch.split(torch.arange(len(data)), batch):
            cond = None if labels is None else Conditioning(labels=labels[rows].to(device))
            key = ("likelihood", seed, stage, draw)
            found[place, rows] += (
                _integrand(denoiser, data[rows].to(device), interval, draw, draws, key, rows, cond) / draws
            )
            done += len(rows)
            if progress is not None:
                progress(done, total)
    dims = math.prod(data.shape[1:])
    prior = data.double().square().flatten(1).sum(1) / (2 * dims * sigma_max**2)
    return Likelihood(
        sigma_min=sigma_min,
        sigma_max=sigma_max,
        draws=draws,
        numbers=tuple(k + 1 for k in intervals),
        intervals=tuple(intervals.values()),
        stages=found,
        prior=prior.cpu(),
        reconstruction=_reconstruction(data, sigma_min, seed, batch) if pixels else None,
    )


def clipped_intervals(stages: Stages, sigma_min: float, sigma_max: float) -> dict[int, tuple[float, float]]:
    """Return each stage's interval clipped to [sigma_min, sigma_max], by stage index, without empty intervals."""
    parts = {k: stages.interval(k) for k in range(len(stages))}
    clipped = {k: (max(low, sigma_min), min(high, sigma_max)) for k, (low, high) in parts.items()}
    return {k: (low, high) for k, (low, high) in clipped.items() if low < high}


def _integrand(
    denoiser: Denoiser,
    y: Tensor,
    interval: tuple[float, float],
    draw: int,
    draws: int,
    key: Sequence[int | str],
    rows: Tensor,
    cond: Conditioning | None,
) -> Tensor:
    """Return MSE / sigma² times the interval's length in ln sigma, at one level per row, float64 (B,), on the CPU."""
    low, length = math.log(interval[0]), math.log(interval[1] / interval[0])
    u = uniform((*key, "level"), rows, 1)[:, 0]
    sigma = torch.exp(low + length * (draw + u) / draws).clamp(*interval)
    noise = normal((*key, "noise"), rows, y.shape[1:], y.dtype).to(y.device)
    spread = sigma.to(y).view(-1, *[1] * (y.ndim - 1))
    error = denoiser(y + spread * noise, sigma.to(y.device), cond).double() - y.double()
    return (error.square().flatten(1).mean(1).cpu() / sigma.square()) * length


def _reconstruction(data: Tensor, sigma_min: float, seed: int, batch: int) -> Tensor:
    """Return -log p(pixel | z) per dimension, where p is the softmax over levels v of -(z - v)² / (2 sigma_min²)."""
    values = torch.arange(LEVELS, dtype=torch.float64) / ((LEVELS - 1) / 2) - 1
    parts = []
    for rows in torch.split(torch.arange(len(data)), max(1, batch // 16)):
        y = data[rows].cpu().double().flatten(1)
        level = ((y + 1) * ((LEVELS - 1) / 2)).round().clamp(0, LEVELS - 1).long()
        z = y + sigma_min * normal(("likelihood", seed, "reconstruction"), rows, y.shape[1:], torch.float64)
        score = -((z[..., None] - values) ** 2) / (2 * sigma_min**2)
        chosen = score.gather(2, level[..., None])[..., 0] - score.logsumexp(2)
        parts.append(-chosen.mean(1))
    return torch.cat(parts)
