"""How alike the optimal denoisers of different noise levels are, measured on noisy training images.

In eps space two denoisers are compared by their noise predictions eps* = (x - m)/sigma (x unscaled, m the posterior
mean), in x0 space by the posterior means themselves; both by the share of coordinates that differ by at most eta.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .. import keyed
from ..optimal import OptimalDenoiser
from ..schedules import VP

Space = Literal["eps", "x0"]
Progress = Callable[[int, int], None]  # (samples done, samples in all)

# Enough rows for the matrix products to run at full speed, few enough to stay near the cache where images are small;
# for large images the numbers per tensor bound the memory (the noise generator's int64 temporaries are larger by far).
_CURVE_ROWS, _CURVE_NUMBERS = 4096, 2**22
_MATRIX_ROWS, _MATRIX_NUMBERS = 256, 2**25


class Similarities(NamedTuple):
    """Algorithm 1's samples, each a float64 (K,) tensor on the CPU.

    Attributes:
        t: times, uniform on the time measure's [t_min, t_max].
        s0: share of coordinates in which the denoiser at t agrees with the one at t -> 0 (the clean image itself).
        s1: the same for t -> 1 (the mean image).
    """

    t: Tensor
    s0: Tensor
    s1: Tensor


def sample_similarities(
    denoiser: OptimalDenoiser,
    *,
    samples: int,
    eta: float,
    space: Space,
    measure: VP,
    seed: int = 0,
    progress: Progress | None = None,
) -> Similarities:
    """Draw (y_k, eps_k, t_k) and compare the denoiser at t_k with its two limits (Algorithm 1, lines 4 to 8).

    Args:
        denoiser: the optimal denoiser of the data set from which y_k are drawn.
        samples: K.
        eta: largest difference that counts as agreement, in the units of `space` (x0: the data's).
        space: "eps" compares (x - m)/sigma, "x0" compares m.
        measure: the kernel in whose time t_k is uniform.
        seed: decides every draw; sample k does not depend on K.
        progress: called after each chunk.
    """
    parts = []
    for rows in _row_chunks(denoiser, samples, min(_CURVE_ROWS, _CURVE_NUMBERS // denoiser.centred.shape[1])):
        u = keyed.uniform((seed, "similarity-t"), rows, 1)[:, 0]
        t = measure.t_min + u * (measure.t_max - measure.t_min)
        y, noise = _draw(denoiser, rows, seed)
        s0, s1 = limit_similarities(denoiser, y, noise, measure.sigma(t), eta=eta, space=space)
        parts.append(torch.stack((t, s0, s1)).cpu())
        if progress is not None:
            progress(int(rows[-1]) + 1, samples)
    return Similarities(*torch.cat(parts, dim=1))


def limit_similarities(
    denoiser: OptimalDenoiser, y: Tensor, noise: Tensor, sigma: Tensor, *, eta: float, space: Space
) -> tuple[Tensor, Tensor]:
    """Return S0 and S1 of the noisy images y + sigma noise, each float64 (B,).

    eps* differs from the noise by (y - m)/sigma and from (x - mean image)/sigma by (mean image - m)/sigma, so eps space
    only scales the threshold.

    Args:
        denoiser: the optimal denoiser.
        y: clean images (B, D).
        noise: standard normal (B, D).
        sigma: float64 (B,).
        eta: as in `sample_similarities`.
        space: as in `sample_similarities`.
    """
    mean = denoiser(torch.addcmul(y, sigma.to(y)[:, None], noise), sigma)
    threshold = (eta * sigma if space == "eps" else torch.full_like(sigma, eta)).to(y)[:, None]
    s0 = _agreement((mean - y).abs_(), threshold)
    s1 = _agreement(mean.sub_(denoiser.mean_image).abs_(), threshold)
    return s0, s1


def similarity_matrix(
    denoiser: OptimalDenoiser,
    nodes: Tensor,
    *,
    samples: int,
    eta: float,
    space: Space,
    measure: VP,
    seed: int = 0,
    progress: Progress | None = None,
) -> Tensor:
    """Compare the denoisers of all pairs of times on the same (y_k, eps_k) (Algorithm 2, lines 4 to 8).

    The published run draws one pair of times per sample; here every sample is compared at every pair, which is the
    exact mean over pairs.

    Args:
        denoiser: the optimal denoiser of the data set from which y_k are drawn.
        nodes: times of `measure`, float64 (M,).
        samples: K.
        eta: as in `sample_similarities`.
        space: as in `sample_similarities`.
        measure: the kernel of the times.
        seed: decides every draw.
        progress: called after each chunk.

    Returns:
        Mean similarity, symmetric, float64 (M, M) on the CPU, in [0, 1], with ones on the diagonal.
    """
    device = denoiser.centred.device
    sigmas = measure.sigma(nodes).to(device)
    total = torch.zeros(len(nodes), len(nodes), dtype=torch.float64, device=device)
    step = min(_MATRIX_ROWS, _MATRIX_NUMBERS // (len(nodes) * denoiser.centred.shape[1]))
    for rows in _row_chunks(denoiser, samples, step):
        outputs = _outputs(denoiser, *_draw(denoiser, rows, seed), sigmas, space)
        for a in range(len(nodes)):
            total[a, a + 1 :] += ((outputs[a + 1 :] - outputs[a]).abs_() <= eta).sum((1, 2))
        if progress is not None:
            progress(int(rows[-1]) + 1, samples)
    total /= samples * denoiser.centred.shape[1]
    return (total + total.T).fill_diagonal_(1.0).cpu()


def _outputs(denoiser: OptimalDenoiser, y: Tensor, noise: Tensor, sigmas: Tensor, space: Space) -> Tensor:
    """Return the posterior mean, or eps* less the (common) noise, of y + sigma noise at every sigma: (M, B, D)."""
    scale = sigmas.to(y)[:, None, None]
    noisy = torch.addcmul(y, scale, noise)
    mean = denoiser(noisy.flatten(0, 1), sigmas.repeat_interleave(len(y))).reshape(noisy.shape)
    return mean if space == "x0" else mean.sub_(y).div_(-scale)


def _agreement(difference: Tensor, threshold: Tensor) -> Tensor:
    """Return the share of coordinates within the threshold: (B, D), (B, 1) -> float64 (B,)."""
    return (difference <= threshold).mean(dim=1, dtype=torch.float64)


def _draw(denoiser: OptimalDenoiser, rows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return (y_k, eps_k) of the samples with these numbers, each (B, D): data points with replacement, and noise."""
    u = keyed.uniform((seed, "similarity-y"), rows, 1)[:, 0]
    y = denoiser.clean((u * len(denoiser)).long())
    return y, keyed.normal((seed, "similarity-noise"), rows, y.shape[1:], y.dtype)


def _row_chunks(denoiser: OptimalDenoiser, samples: int, step: int) -> Iterator[Tensor]:
    """Yield the sample numbers 0..samples-1, at most `step` (at least 1) at a time, on the denoiser's device."""
    step, device = max(1, step), denoiser.centred.device
    return (torch.arange(start, min(start + step, samples), device=device) for start in range(0, samples, step))
