"""Denoising errors by noise level, for the comparison of denoisers on the same images and noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Conditioning, Denoiser
from ..progress import Progress
from ..rng import normal
from .likelihood import Estimate


@torch.no_grad()
def denoising_errors(
    denoiser: Denoiser,
    data: Tensor,
    sigmas: Tensor,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    batch: int = 256,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> Tensor:
    """Return the squared error per dimension of every row at every noise level, float64 (M, N).

    The noise depends only on (seed, level, row), so two denoisers meet the same noise.

    Args:
        denoiser: any Denoiser.
        data: (N, ...) floating point: pixels in [-1, 1], or latents times the run's scale.
        sigmas: noise levels, float64 (M,).
        labels: class labels int64 (N,) for the denoiser, or None.
        seed: seed of the noise.
        batch: rows per denoiser call.
        device: where the denoiser runs.
        progress: called with (rows done, rows in total), where each level counts its rows.
    """
    found = torch.empty(len(sigmas), len(data), dtype=torch.float64)
    for level, sigma in enumerate(sigmas.tolist()):
        for rows in torch.split(torch.arange(len(data)), batch):
            y = data[rows].to(device)
            noise = normal(("compare", seed, level), rows, y.shape[1:], y.dtype).to(device)
            cond = None if labels is None else Conditioning(labels=labels[rows].to(device))
            spread = torch.full((len(rows),), sigma, dtype=torch.float64, device=y.device)
            error = denoiser(y + sigma * noise, spread, cond).double() - y.double()
            found[level, rows] = error.square().flatten(1).mean(1).cpu()
            if progress is not None:
                progress(level * len(data) + int(rows[-1]) + 1, found.numel())
    return found


def relative_differences(errors: Tensor, base: Tensor) -> tuple[Estimate, ...]:
    """Return, for every noise level, the difference of two denoisers' errors (M, N) over the mean error of `base`.

    The differences are paired: their standard errors are those of the rows' differences.
    """
    return tuple(Estimate.of((own - other) / other.mean()) for own, other in zip(errors, base, strict=True))


def excess_shares(errors: Tensor, least: Tensor) -> tuple[Estimate, ...]:
    """Return, for every noise level, the part of a denoiser's mean error (M, N) that is above the least possible error (M, N).

    The least error is that of the optimal denoiser on images of its own data set, where no denoiser has a lower mean.
    """
    return tuple(Estimate.of((own - other) / own.mean()) for own, other in zip(errors, least, strict=True))


def bound_difference(errors: Tensor, base: Tensor, sigmas: Tensor) -> Estimate:
    """Return the difference of two denoisers' variational bounds over the range of the levels, in nats per dimension.

    The bound's integrand is error / sigma² over ln sigma (see `likelihood`), integrated by trapezoids.
    """
    integrand = (errors - base) / sigmas[:, None] ** 2
    return Estimate.of(torch.trapezoid(integrand, sigmas.log(), dim=0))
