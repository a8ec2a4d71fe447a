"""Batched posterior means of noisy data points, at the speed of the underlying matrix products.

The optimal denoiser at x = y_k + sigma eps is a weighted mean of all images (Proposition 1). The weights are taken
relative to the weight of y_k: w_i / w_k = exp(((x·y_i - |y_i|²/2) - (x·y_k - |y_k|²/2)) / sigma²). y_k is a draw from
the posterior, so this rarely overflows (rows that overflow are computed again). No maximum is needed, so one pass over
the images suffices, a tile at a time. For each row, a tile is skipped if its weights are negligible (their sum is
known, so the error is bounded). It is added image by image if only few images have relevant weights, else by a matrix
product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ..data.rows import ArrayRows, Rows, read
from ..errors import UserError

Images = Tensor | Rows

NEGLIGIBLE = 1e-6  # share of a row's weight that may be skipped; changes a mean by at most this times the data range
_FEW = 32  # maximum number of images of a tile that are added one by one
_MOST = 0.75  # above this share of relevant rows, a product of all rows is cheaper than selecting rows
_TILE = 4096  # columns of the score matrix: large enough for fast products, small enough for the cache


def as_images(images: Images | npt.NDArray[Any]) -> Images:
    """Return an array as rows; return tensors and rows unchanged."""
    return ArrayRows(images) if isinstance(images, np.ndarray) else images


class TiledImages:
    """Images as centred float32 rows, converted one tile at a time; the images may be larger than memory.

    Attributes:
        mean_image: (D,), float32.
        half_square: |y_i|²/2 of the centred images, (N,), float32.
    """

    def __init__(
        self,
        images: Images | npt.NDArray[Any],
        data_range: tuple[float, float] = (-1.0, 1.0),
        *,
        device: torch.device | str | None = None,
        budget: int = 1 << 30,
        shard: tuple[int, int] = (0, 1),
        reduce: Callable[[Tensor, Literal["sum", "max"]], None] | None = None,
    ) -> None:
        """Compute the mean and the squares of all images.

        Args:
            images: (N, ...): uint8, mapped from 0..255 onto data_range, or floats already in it. A tensor or an array
                is kept, other rows are read tile by tile.
            data_range: (low, high) of the pixels.
            device: of the computation; None: the images' device.
            budget: bytes; the images are cached as float32 if this takes at most half of the budget.
            shard: (i, n): posterior sums cover only the i-th of n shares of the images; `rows` still returns any image.
            reduce: replaces a tensor in place by its sum or maximum over the n processes with the shares; for n > 1.

        Raises:
            UserError: if images are not finite.
        """
        self._images = as_images(images)
        self.data_range = data_range
        self._low, self._step = data_range[0], (data_range[1] - data_range[0]) / 255.0
        own = self._images.device if isinstance(self._images, Tensor) else torch.device("cpu")
        self.device = own if device is None else torch.device(device)
        self.dim = self._part(slice(0, 1)).numel()
        self._shard, self._reduce = shard, reduce
        self._held: Tensor | None = None
        self.mean_image = torch.zeros(self.dim, device=self.device)
        total = torch.zeros(self.dim, dtype=torch.float64, device=self.device)
        for part in self._tiles(0, len(self)):
            total += self._read(part).sum(0, dtype=torch.float64)
        if not bool(torch.isfinite(total).all()):
            raise UserError("stages: images hold NaN or infinite values; remove those images")
        self.mean_image = (total / len(self)).to(torch.float32)
        if 4 * len(self) * self.dim <= budget // 2:
            held = torch.empty(len(self), self.dim, device=self.device)
            for part in self._tiles(0, len(self)):
                held[part] = self._read(part)
            self._held = held
        self.half_square = torch.cat([self.tile(p).square().sum(1).div_(2) for p in self._tiles(0, len(self))])

    def __len__(self) -> int:
        return len(self._images)

    def spans(self) -> Iterator[slice]:
        """Yield the indices of this share's images as consecutive tiles."""
        index, count = self._shard
        return self._tiles(len(self) * index // count, len(self) * (index + 1) // count)

    def over_all(self, values: Tensor, how: Literal["sum", "max"] = "sum") -> Tensor:
        """Reduce values of this share of the images in place to their sum or maximum over all shares; return them."""
        if self._reduce is not None:
            self._reduce(values, how)
        return values

    def _tiles(self, start: int, stop: int) -> Iterator[slice]:
        return (slice(first, min(first + _TILE, stop)) for first in range(start, stop, _TILE))

    def tile(self, part: slice) -> Tensor:
        """Return the images of a slice, centred, float32 (T, D)."""
        return self._read(part) if self._held is None else self._held[part]

    def rows(self, index: Tensor) -> Tensor:
        """Return the images with these indices, centred, float32 (B, D)."""
        if self._held is not None:
            return self._held[index]
        return self._floats(read(self._images, index))

    def as_rows(self, images: Tensor) -> Tensor:
        """Return other images of the same shape as centred rows, float32 (B, D)."""
        return self._floats(images)

    def vary(self) -> bool:
        """Return whether any two images differ."""
        first = self._part(slice(0, 1))
        return any(bool((self._part(part) != first).any()) for part in self._tiles(0, len(self)))

    def _read(self, part: slice) -> Tensor:
        return self._floats(self._part(part))

    def _part(self, part: slice) -> Tensor:
        images = self._images
        return images[part] if isinstance(images, Tensor) else read(images, torch.arange(part.start, part.stop))

    def _floats(self, images: Tensor) -> Tensor:
        flat = images.to(self.device).flatten(1).to(torch.float32)
        if images.dtype == torch.uint8:
            flat.mul_(self._step).add_(self._low)
        return flat - self.mean_image


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products in full float32: TF32 is too imprecise at low noise."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
@full_float32()
def posterior_means(data: TiledImages, own: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """Return E[y | x] - y_k for x = y_k + sigma eps, for the same (y_k, eps_k) at several sigmas.

    The scores of a row at all its sigmas share the products y_k·y_i and eps·y_i.

    Args:
        data: the images.
        own: indices k of the images (B,), int64; all rows are computed at once, so B and G determine the memory.
        noise: standard normal (B, D), float32.
        sigmas: float64 (G, B), > 0, in the units of the data.

    Returns:
        float32 (G, B, D): the posterior means minus y_k.
    """
    y = data.rows(own)
    sums = [_Sums(data, own, y) for _ in sigmas]
    scales = sigmas.pow(-2).to(y)[:, :, None]
    if len(sigmas) == 1:
        _one_sigma(data, own, y, noise, sigmas[0].to(y)[:, None], scales[0], sums[0])
    else:
        _many_sigmas(data, own, y, noise, sigmas.to(y)[:, :, None], scales, sums)
    return torch.stack([here.means(noise, sigma) for here, sigma in zip(sums, sigmas, strict=True)])


def _one_sigma(
    data: TiledImages, own: Tensor, y: Tensor, noise: Tensor, sigma: Tensor, scale: Tensor, sums: _Sums
) -> None:
    x = torch.addcmul(y, sigma, noise)
    ours = (x * y).sum(1).sub_(data.half_square[own])[:, None]
    for span in data.spans():
        tile = data.tile(span)
        scores = torch.addmm(data.half_square[span], x, tile.T, beta=-1)
        sums.add(scores.sub_(ours).mul_(scale).exp_(), tile, span)


def _many_sigmas(
    data: TiledImages, own: Tensor, y: Tensor, noise: Tensor, sigmas: Tensor, scales: Tensor, sums: list[_Sums]
) -> None:
    still_ours, moved_ours = data.half_square[own][:, None], (noise * y).sum(1)[:, None]
    for span in data.spans():
        tile = data.tile(span)
        still = torch.addmm(data.half_square[span], y, tile.T, beta=-1).sub_(still_ours)
        moved = torch.mm(noise, tile.T).sub_(moved_ours)
        for sigma, scale, here in zip(sigmas, scales, sums, strict=True):
            here.add(torch.addcmul(still, sigma, moved).mul_(scale).exp_(), tile, span)


@torch.no_grad()
@full_float32()
def posterior_means_of(data: TiledImages, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the centred E[y | x] for any centred x (B, D) = y + sigma eps; y need not be in the data.

    sigma is float64 (B,), > 0. The dtype of the computation is x's, float32 or float64. Weights are taken relative to
    the largest weight, which needs a second pass over the images.
    """
    scale = sigma.pow(-2).to(x)[:, None]

    def scores(span: slice) -> Tensor:
        tile = data.tile(span).to(x)
        half = data.half_square[span] if x.dtype == torch.float32 else tile.square().sum(1).div_(2)
        return torch.addmm(half, x, tile.T, beta=-1)

    best = x.new_full((len(x), 1), -math.inf)
    for span in data.spans():
        best = torch.maximum(best, scores(span).amax(1, keepdim=True))
    data.over_all(best, "max")
    total, mean = x.new_zeros(len(x), 1), torch.zeros_like(x)
    for span in data.spans():
        weights = scores(span).sub_(best).mul_(scale).exp_()
        total += weights.sum(1, keepdim=True)
        mean.addmm_(weights, data.tile(span).to(x))
    return data.over_all(mean).div_(data.over_all(total))


class _Sums:
    """Weighted sums of all images except y_k, whose weight is 1."""

    def __init__(self, data: TiledImages, own: Tensor, y: Tensor) -> None:
        self.data, self.own, self.y = data, own, y
        self.total = y.new_zeros(len(y))
        self.sum = torch.zeros_like(y)

    def add(self, weights: Tensor, tile: Tensor, span: slice) -> None:
        """Add the images of a tile (T, D) with weights (B, T); the weights are overwritten."""
        here = ((self.own >= span.start) & (self.own < span.stop)).nonzero().flatten()
        weights[here, self.own[here] - span.start] = 0.0
        mass = weights.sum(1)
        rows = (mass > NEGLIGIBLE * len(tile) / len(self.data)).nonzero().flatten()
        if len(rows) == 0:
            return
        if len(rows) > _MOST * len(weights):
            self.total += mass
            self.sum.addmm_(weights, tile)
            return
        weights = weights[rows]
        large = weights > NEGLIGIBLE / len(self.data)
        few = large.sum(1) <= _FEW
        self.total.index_add_(0, rows, mass[rows])
        if bool(few.any()):
            self._add_few(rows[few], weights[few], large[few], tile)
        if not bool(few.all()):
            self.sum.index_add_(0, rows[~few], weights[~few] @ tile)

    def _add_few(self, rows: Tensor, weights: Tensor, large: Tensor, tile: Tensor) -> None:
        row, column = large.nonzero(as_tuple=True)
        starts = torch.searchsorted(row, torch.arange(len(rows), device=row.device))
        picked = F.embedding_bag(column, tile, starts, mode="sum", per_sample_weights=weights[row, column])
        self.sum.index_add_(0, rows, picked)

    def means(self, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return E[y | y_k + sigma eps] - y_k; rows whose weights overflowed are computed again."""
        self.data.over_all(self.total)
        self.data.over_all(self.sum)
        means = torch.addcmul(self.sum, self.total[:, None], self.y, value=-1).div_(1 + self.total[:, None])
        wrong = (~torch.isfinite(means).all(1)).nonzero().flatten()
        if len(wrong):
            x = torch.addcmul(self.y[wrong], sigma[wrong].to(noise)[:, None], noise[wrong])
            means[wrong] = posterior_means_of(self.data, x, sigma[wrong]) - self.y[wrong]
        return means
