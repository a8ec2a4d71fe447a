"""Stages by the Wiener denoiser: the optimal denoiser of Gaussian data with the images' mean and covariance.

The optimal denoiser of a finite data set knows which image it sees up to high noise, and more so in higher dimension. The
Wiener denoiser generalises: D(x; sigma) = mu + U diag(g) U^T (x - mu), g_i = lambda_i / (lambda_i + sigma²), where the
lambda_i are the eigenvalues of the covariance and U its eigenvectors. Two noise levels are compared by the network's own
output F = (D - c_skip x) / c_out for the same image and noise; the expected squared distance has a closed form. The noise
levels are quantiles of the training density, so each counts as often as it is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import rng
from ..errors import UserError
from ..progress import Progress
from ..schedules import LogNormal, SigmaPrior
from .boundaries import Array, Partition, cheapest_groups

LEVELS = 400  # quantiles of the training density
RESAMPLES = 200  # of the bootstrap
BINS = 256  # eigenvalues of its spectra
_FIT = (1 / 8, 1 / 2)  # ranks between these shares of the number of images fit the power law of the unseen tail
_EXHAUSTED = 1e-12  # an eigenvalue below this share of the largest one is zero
_SAME = 1e-20  # a variance below this share of the mean square is rounding: all images are the same
_COLUMNS = 4096  # of the images at a time, in float64
Output = Callable[[Tensor], tuple[Tensor, Tensor]]  # sigma -> (c_skip, c_out) of the network's output


class Spectrum(NamedTuple):
    """Second-order statistics of a data set.

    Attributes:
        values: eigenvalues of the covariance, descending, float64 (d,); those that few images do not show are
            extrapolated.
        mean_square: squared norm of the mean image.
        counts: number of eigenvalues that each of `values` stands for, float64 (d,); None: 1.
    """

    values: Tensor
    mean_square: float
    counts: Tensor | None = None

    @property
    def dim(self) -> float:
        """Number of coordinates of an image."""
        return len(self.values) if self.counts is None else float(self.counts.sum())

    def binned(self, bins: int = BINS) -> Spectrum:
        """Return a spectrum of at most `bins` eigenvalues: means over even bins of ln lambda, with their counts."""
        if len(self.values) <= bins or self.counts is not None:
            return self
        logs = self.values.clamp(min=float(self.values[0]) * _EXHAUSTED).log()
        span = float(logs[0] - logs[-1])
        number = ((logs[0] - logs) * (bins - 1e-9) / max(span, 1e-300)).long()
        counts = torch.bincount(number, minlength=bins).to(torch.float64)
        sums = torch.bincount(number, self.values, minlength=bins)
        used = counts > 0
        return Spectrum(sums[used] / counts[used], self.mean_square, counts[used])

    @property
    def sigma_data(self) -> float:
        """Standard deviation of a coordinate about the mean image."""
        total = self.values.sum() if self.counts is None else self.values @ self.counts
        return math.sqrt(float(total) / self.dim)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a sample of images, with what a bootstrap over the images needs.

    Attributes:
        values: eigenvalues of the sample covariance, descending, float64 (r,), r = min(n - 1, d).
        squares: squared coordinates of each image in the eigenbasis, less the mean, float64 (n, r).
        mean_square: squared norm of the mean image.
        dim: d, coordinates of an image.
    """

    values: Tensor
    squares: Tensor
    mean_square: float
    dim: int

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.squares)

    def spectrum(self, weights: Tensor | None = None) -> Spectrum:
        """Return the spectrum for image weights that sum to n, float64 (n,); None: all weights are 1.

        With weights, an eigenvalue is the variance along its eigenvector. This is exact to first order in the change of
        the covariance, for every function of the covariance that depends on its eigenvalues only.
        """
        values = self.values if weights is None else weights @ self.squares / (self.images - 1)
        return Spectrum(with_tail(values.sort(descending=True).values, self.images, self.dim), self.mean_square)


def measure_moments(images: Tensor, *, scale: float = 1.0, shift: float = 0.0) -> Moments:
    """Return mean and covariance of scale * images + shift, the images in the network's range.

    The smaller of the covariance (d, d) and the Gram matrix (n, n) is diagonalised, in float64. Images are converted a
    few columns at a time.

    Args:
        images: (n, ...), n >= 16, uint8 or floating point.
        scale, shift: map them to the network's range.

    Raises:
        UserError: if there are fewer than 16 images, they are all the same, or a value is not finite.
    """
    rows = images.flatten(1)
    count, dim = rows.shape
    if count < 16:
        raise UserError(f"stages: {count} images are too few for a covariance; give at least 16")
    mean = torch.cat([part.mean(0) for part in _columns(rows, scale, shift)])
    if not bool(torch.isfinite(mean).all()):
        raise UserError("stages: the images hold NaN or infinite values; remove those images")
    if dim <= count:
        centred = torch.cat(list(_columns(rows, scale, shift)), dim=1) - mean
        values, vectors = torch.linalg.eigh(centred.T @ centred / (count - 1))
        squares = (centred @ vectors) ** 2
    else:
        gram = torch.zeros(count, count, dtype=torch.float64, device=rows.device)
        for part, centre in zip(_columns(rows, scale, shift), torch.split(mean, _COLUMNS), strict=True):
            part -= centre
            gram += part @ part.T
        values, vectors = torch.linalg.eigh(gram / (count - 1))
        squares = vectors**2 * values.clamp(min=0.0) * (count - 1)
    rank = min(count - 1, dim)
    values, squares = values.flip(0)[:rank].clamp(min=0.0), squares.flip(1)[:, :rank]
    if not float(values[0]) > _SAME * max(1.0, float(mean @ mean)):
        raise UserError(f"stages: all {count} images are the same; give at least two different images")
    return Moments(values.cpu(), squares.cpu(), float(mean @ mean), dim)


def _columns(rows: Tensor, scale: float, shift: float) -> Iterator[Tensor]:
    """Yield scale * rows + shift in float64, _COLUMNS columns at a time."""
    return (part.to(torch.float64, copy=True).mul_(scale).add_(shift) for part in torch.split(rows, _COLUMNS, dim=1))


def with_tail(values: Tensor, images: int, dim: int) -> Tensor:
    """Return all d eigenvalues: from rank n/2 on, where a sample of n images no longer shows them, by a power law.

    The law ln lambda = a - p ln rank is fitted by least squares to the ranks n/8 .. n/2. It continues from the fit's value,
    and keeps the tail descending (p >= 0). If the eigenvalues end before (the images fill a subspace), there is no tail.

    Args:
        values: eigenvalues of the sample covariance, descending, float64 (r,).
        images: n.
        dim: d.
    """
    last = min(math.ceil(_FIT[1] * images), len(values))
    if last >= dim or float(values[last - 1]) <= _EXHAUSTED * float(values[0]):
        return torch.cat([values, values.new_zeros(dim - len(values))])
    first = max(1, math.floor(_FIT[0] * images))
    ranks = torch.arange(1, dim + 1, dtype=torch.float64).log()
    x, y = ranks[first - 1 : last], values[first - 1 : last].log()
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum().clamp(min=1e-300))
    slope = min(slope, 0.0)
    tail = (y.mean() + slope * (ranks[last:] - x.mean())).exp()
    return torch.cat([values[:last], tail.clamp(max=float(values[last - 1]))])


def density_levels(prior: SigmaPrior, count: int = LEVELS) -> Tensor:
    """Return the noise levels at the quantiles (i + 1/2) / count of a training density, ascending float64 (count,)."""
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels: Tensor = torch.unique(prior.sample(u))
    return levels


def propose_density(spectrum: Spectrum, quantum: float = 0.0) -> LogNormal:
    """Return a training density for the data: where a denoiser can learn something.

    L(sigma) is the Wiener denoiser's loss in units in which EDM's network has loss 1 before training (Karras et al. 2022,
    section 5). It is 1 at low noise (hopeless: noise cannot be told from detail) and at high noise (the mean image is the
    answer). The density is log-normal with mean and standard deviation of ln sigma under the weight 1 - L.

    Args:
        spectrum: of the data.
        quantum: step between two grey levels; its rounding noise, quantum²/12, is added to all eigenvalues.
    """
    values = spectrum.values + quantum**2 / 12
    counts = torch.ones_like(values) if spectrum.counts is None else spectrum.counts
    square = float(values @ counts) / spectrum.dim  # sigma_data²
    logs = torch.linspace(-12.0, 12.0, 2001, dtype=torch.float64) + math.log(square) / 2
    noise = (2 * logs).exp()
    left = torch.stack([(values / (values + s)) @ counts for s in noise]) / spectrum.dim  # loss / sigma²
    weight = (1.0 - left * (noise + square) / square).clamp(min=0.0)
    total = float(weight.sum())
    if total <= 1e-9 * len(logs):
        raise UserError("stages: density=auto: all directions of the images vary alike, so no noise level is special")
    mean = float(weight @ logs) / total
    std = math.sqrt(float(weight @ (logs - mean) ** 2) / total)
    return LogNormal(p_mean=round(mean, 2), p_std=round(std, 2))


def output_distances(spectrum: Spectrum, sigma: Tensor, output: Output) -> Tensor:
    """Return the expected squared distance per coordinate between the network's outputs at all pairs of noise levels.

    S(a, b) = (1/d) {sum_i [lambda_i (f_ai - f_bi)² + (sigma_a f_ai - sigma_b f_bi)²] + |mu|² (m_a - m_b)²} with
    f = (g - c_skip) / c_out and m = (1 - c_skip) / c_out.

    Args:
        spectrum: of the data.
        sigma: noise levels > 0, float64 (M,).
        output: the network's preconditioning.

    Returns:
        float64 (M, M), symmetric with zeros on the diagonal.
    """
    skip, out = (c.to(torch.float64) for c in output(sigma))
    mean = ((1.0 - skip) / out * math.sqrt(spectrum.mean_square))[:, None]
    total = _squared_distances(mean)
    counts = torch.ones_like(spectrum.values) if spectrum.counts is None else spectrum.counts
    for values, weights in zip(torch.split(spectrum.values, _COLUMNS), torch.split(counts, _COLUMNS), strict=True):
        gain = values / (values + sigma[:, None] ** 2)
        f = (gain - skip[:, None]) / out[:, None] * weights.sqrt()
        total += _squared_distances(torch.cat([values.sqrt() * f, sigma[:, None] * f], dim=1))
    return total / spectrum.dim


def _squared_distances(points: Tensor) -> Tensor:
    """Return the squared distances of all pairs of rows: (M, n) -> (M, M)."""
    points = points - points.mean(0)  # less cancellation below
    squares, products = (points**2).sum(1), points @ points.T
    return (squares[:, None] + squares - 2.0 * products).clamp(min=0.0).fill_diagonal_(0.0)


def cluster(distances: Tensor, stages: int) -> list[Partition]:
    """Divide the noise levels into 1 .. `stages` contiguous groups, each compact in the sense of k-means.

    The cost of a group of n levels is (1/n) sum_{a,b} S(a, b) over its ordered pairs. It is twice the sum of squared
    distances from the group's mean output.

    Returns:
        For each number of groups, the index of the first level of each group except the first one, and the cost.

    Raises:
        UserError: if there are fewer levels than groups.
    """
    levels = len(distances)
    if not 1 <= stages <= levels:
        raise UserError(f"stages: stages={stages} must be between 1 and the {levels} noise levels compared")
    prefix = torch.zeros(levels + 1, levels + 1, dtype=torch.float64)
    prefix[1:, 1:] = distances.cumsum(0).cumsum(1)
    corner = prefix.diagonal()
    start, end = torch.arange(levels)[:, None], torch.arange(levels + 1)[None, :]
    sums = corner[None, :] - prefix[:levels] - prefix[:, :levels].T + corner[:levels, None]
    cost = torch.where(end > start, sums / (end - start).clamp(min=1), math.inf)
    return cheapest_groups(cost.numpy(), stages)


def edges_between(sigma: Tensor, first: tuple[int, ...]) -> tuple[float, ...]:
    """Return the edges: halfway, in ln sigma, between the last level of a group and the first of the next."""
    return tuple(math.sqrt(float(sigma[i - 1]) * float(sigma[i])) for i in first)


def gaussian_edges(spectrum: Spectrum, prior: SigmaPrior, output: Output, stages: int) -> tuple[float, ...]:
    """Return the interior stage edges (sigma, ascending) for a spectrum, a training density and a preconditioning."""
    sigma = density_levels(prior)
    return edges_between(sigma, cluster(output_distances(spectrum, sigma, output), stages)[-1][0])


def bootstrap_edges(
    moments: Moments,
    prior: SigmaPrior,
    output: Output,
    stages: int,
    *,
    seed: int,
    resamples: int = RESAMPLES,
    progress: Progress | None = None,
) -> Array:
    """Return the edges for resamples of the images, drawn with replacement: float64 (resamples, stages - 1).

    The spectrum is reduced to BINS eigenvalues, which changes an edge by less than one of the noise levels compared.
    """
    generator = torch.Generator().manual_seed(rng.fold((seed, "gaussian-bootstrap")) >> 1)
    found = []
    for number in range(resamples):
        drawn = torch.randint(moments.images, (moments.images,), generator=generator)
        weights = torch.bincount(drawn, minlength=moments.images).to(torch.float64)
        found.append(gaussian_edges(moments.spectrum(weights).binned(), prior, output, stages))
        if progress is not None:
            progress(number + 1, resamples)
    edges: Array = torch.tensor(found, dtype=torch.float64).reshape(resamples, stages - 1).numpy()
    return edges
