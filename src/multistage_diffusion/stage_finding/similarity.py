"""Similarity of the optimal denoisers at different noise levels, measured on noisy training images.

In eps space two denoisers are compared by their noise predictions eps* = (x - m)/sigma (x unscaled, m the posterior
mean), in x0 space by the posterior means. Their similarity is the share of coordinates that differ by at most eta.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import rng
from ..progress import Progress
from ..schedules.vp import VP
from .posterior import TiledImages, posterior_means, posterior_means_of

Space = Literal["eps", "x0"]

# Maximum rows of the score matrix (enough for full speed), and maximum elements of the sums of all times of the rows.
_ROWS, _NUMBERS = 1024, 2**24


class Similarities(NamedTuple):
    """Algorithm 1's samples: K noisy images (y_k, eps_k), each at G times; float64 (K, G) tensors on the CPU.

    Attributes:
        t: times, uniform on the time measure's [t_min, t_max]; within a sample they are (t_max - t_min) / G apart.
        s0: share of coordinates in which the denoiser at t agrees with the one at t -> 0 (the clean image itself).
        s1: the same for t -> 1 (the mean image).
    """

    t: Tensor
    s0: Tensor
    s1: Tensor


def sample_similarities(
    data: TiledImages,
    numbers: range,
    *,
    times: int,
    eta: float,
    space: Space,
    measure: VP,
    seed: int = 0,
    progress: Progress | None = None,
) -> Similarities:
    """Draw (y_k, eps_k) and compare the denoiser at several times with its two limits (Algorithm 1, lines 4 to 8).

    One time per sample is the published estimator. More times share the sample (common random numbers) and most of the
    work. They are evenly spaced from a random start, so each time is uniform and the mean over t is unbiased.

    Args:
        data: the images from which y_k are drawn and which define the posterior.
        numbers: sample numbers k; a sample does not depend on the other numbers.
        times: G, times per sample.
        eta: largest difference that counts as agreement, in the units of `space` (x0: the data's).
        space: "eps" compares (x - m)/sigma, "x0" compares m.
        measure: the kernel in whose time t is uniform.
        seed: determines every draw.
        progress: called after each chunk with (samples done, total samples).
    """
    parts, done = [torch.empty(3, 0, times, dtype=torch.float64)], 0  # a process may have no samples
    for rows in _chunks(data, numbers, times):
        start = rng.uniform((seed, "similarity-t"), rows, 1)
        share = (torch.arange(times, dtype=torch.float64, device=data.device) + start) / times
        t = measure.t_min + share * (measure.t_max - measure.t_min)
        own, noise = draw(data, rows, seed)
        s0, s1 = limit_similarities(data, own, noise, measure.sigma(t.T), eta=eta, space=space)
        parts.append(torch.stack((t, s0.T, s1.T)).cpu())
        done += len(rows)
        if progress is not None:
            progress(done, len(numbers))
    return Similarities(*torch.cat(parts, dim=1))


def limit_similarities(
    data: TiledImages, own: Tensor, noise: Tensor, sigmas: Tensor, *, eta: float, space: Space
) -> tuple[Tensor, Tensor]:
    """Return S0 and S1 of the noisy images y_k + sigma noise, each float64 (G, B).

    eps* minus the noise is (y - m)/sigma, and eps* minus (x - mean image)/sigma is (mean image - m)/sigma. So eps space
    only scales the threshold.

    Args:
        data: the images.
        own: indices k of the images (B,).
        noise: standard normal (B, D).
        sigmas: float64 (G, B).
        eta: as in `sample_similarities`.
        space: as in `sample_similarities`.
    """
    moved = posterior_means(data, own, noise, sigmas)
    threshold = (eta * sigmas if space == "eps" else torch.full_like(sigmas, eta)).to(moved)[:, :, None]
    s0 = agreement(moved, threshold)
    return s0, agreement(moved.add_(data.rows(own)), threshold)  # the centred mean is m - mean image


def pair_similarities(
    data: TiledImages,
    nodes: Tensor,
    numbers: range,
    *,
    eta: float,
    space: Space,
    measure: VP,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Compare the denoisers at all pairs of times on the same (y_k, eps_k) (Algorithm 2, lines 4 to 8).

    The published run draws one pair of times per sample. Here every sample is compared at every pair, so the mean over
    pairs is exact.

    Args:
        data: the images from which y_k are drawn and which define the posterior.
        nodes: times of `measure`, float64 (M,).
        numbers: sample numbers k.
        eta: as in `sample_similarities`.
        space: as in `sample_similarities`.
        measure: the kernel of the times.
        seed: determines every draw.
        progress: called after each chunk with (samples done, total samples).

    Returns:
        Similarities of every sample, in [0, 1], float32 (K, M, M) on the CPU, symmetric with ones on the diagonal.
    """
    sigmas = measure.sigma(nodes).to(data.device)
    parts, done = [torch.empty(0, len(nodes), len(nodes))], 0  # a process may have no samples
    for rows in _chunks(data, numbers, len(nodes)):
        own, noise = draw(data, rows, seed)
        outputs = posterior_means(data, own, noise, sigmas[:, None].expand(-1, len(own)))
        if space == "eps":  # eps* minus the noise, which all times share
            outputs.div_(-sigmas.to(outputs)[:, None, None])
        parts.append(_pairs(outputs, eta).cpu())
        done += len(rows)
        if progress is not None:
            progress(done, len(numbers))
    return torch.cat(parts)


def outside_pairs(
    data: TiledImages,
    images: Tensor,
    nodes: Tensor,
    samples: int,
    *,
    eta: float,
    space: Space,
    measure: VP,
    seed: int = 0,
    numbered: bool = False,
) -> Tensor:
    """Return the similarities of `pair_similarities` for noisy images that need not be in the data.

    Args:
        data: the images that define the posterior.
        images: centred rows (M, D) from which y_k are drawn; their dtype is used for the computation.
        nodes: as in `pair_similarities`.
        samples: K.
        eta: as in `sample_similarities`.
        space: as in `sample_similarities`.
        measure: the kernel of the times.
        seed: determines every draw.
        numbered: use the images in order instead of drawing them.
    """
    sigmas = measure.sigma(nodes).to(data.device)
    parts = []
    for rows in _chunks(data, range(samples), len(nodes)):
        drawn = rng.uniform((seed, "similarity-y"), rows, 1)[:, 0] * len(images)
        y = images[rows if numbered else drawn.long()]
        noise = rng.normal((seed, "similarity-noise"), rows, (data.dim,)).to(y)
        x = (y + sigmas.to(y)[:, None, None] * noise).flatten(0, 1)
        means = posterior_means_of(data, x, sigmas.repeat_interleave(len(rows)))
        outputs = means.view(len(nodes), *y.shape) - y
        if space == "eps":
            outputs.div_(-sigmas.to(outputs)[:, None, None])
        parts.append(_pairs(outputs, eta).cpu())
    return torch.cat(parts)


def _pairs(outputs: Tensor, eta: float) -> Tensor:
    """Return the agreement of all pairs of the M outputs for every row: (M, B, D) -> (B, M, M)."""
    nodes, rows, _ = outputs.shape
    pairs = outputs.new_zeros(rows, nodes, nodes)
    for a in range(nodes):
        same = ((outputs[a + 1 :] - outputs[a]).abs_() <= eta).to(torch.float32).mean(2)
        pairs[:, a, a + 1 :] = same.T
    return (pairs + pairs.mT) + torch.eye(nodes, device=outputs.device)


def agreement(difference: Tensor, threshold: Tensor) -> Tensor:
    """Return the share of coordinates within the threshold: (G, B, D), (G, B, 1) -> float64 (G, B)."""
    return torch.stack(
        [(d.abs() <= t).mean(dim=1, dtype=torch.float64) for d, t in zip(difference, threshold, strict=True)]
    )


def draw(data: TiledImages, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return (k, eps_k) of the samples with these numbers: data indices (B,) with replacement, and noise (B, D)."""
    u = rng.uniform((seed, "similarity-y"), rows, 1)[:, 0]
    return (u * len(data)).long(), rng.normal((seed, "similarity-noise"), rows, (data.dim,))


def _chunks(data: TiledImages, numbers: range, times: int) -> Iterator[Tensor]:
    """Yield chunks of sample numbers; the sums of all times bound the chunk size."""
    step = max(1, min(_ROWS, _NUMBERS // (times * data.dim)))
    return (torch.tensor(numbers[i : i + step], device=data.device) for i in range(0, len(numbers), step))
