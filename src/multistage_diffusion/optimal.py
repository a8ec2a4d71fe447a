"""The optimal denoiser of a finite data set, in closed form.

For data y_1..y_N and x = y + sigma n the posterior over the data is w_i ∝ exp(-||x - y_i||² / 2 sigma²), so that
E[y | x] = Σ w_i y_i (Proposition 1, eq. 20). In the expanded square, ||x||² is the same for all i and cancels. Two
matrix products around a softmax remain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .contracts import Conditioning, sigma_rows
from .errors import UserError
from .memory import require_memory

# Below this sigma the posterior is the limit sigma -> 0 in any precision (and 1/sigma² would overflow in fp32).
_ZERO_SIGMA = 1e-12
# On a CPU the scores of a chunk should stay near the cache; more rows gain nothing there.
_CPU_ROWS = 512


class OptimalDenoiser:
    """The Denoiser with the lowest possible loss on a finite training set.

    It holds all data points as N·D numbers of `dtype`, and needs as much again while it is prepared.
    Scores are chunked over rows only: one row needs 2 N numbers (480 kB in fp32 for N = 60,000), so a row always fits.
    Autocast is switched off inside; under `torch.set_float32_matmul_precision("high")` a GPU would use TF32, which is
    too coarse at low noise: use dtype=torch.float64 there. No gradient flows through a call.

    Attributes:
        centred: the data minus their mean image, (N, D), of `dtype`. Centring keeps the expanded square precise.
        mean_image: (D,), of `dtype`.
    """

    def __init__(self, data: Tensor, *, dtype: torch.dtype = torch.float32, memory_budget: int = 512 * 2**20) -> None:
        """Prepare the data set; calls run on its device.

        Args:
            data: (N, ...) floating point, N >= 1, in any units; sigma is in the same units.
            dtype: torch.float32 or torch.float64, for the arithmetic.
            memory_budget: bytes that a call may use for its scores and weights.

        Raises:
            UserError: if the data are empty, not floating point or not finite, dtype is neither of the two, or main
                memory is too small.
        """
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"optimal denoiser: dtype={dtype} must be torch.float32 or torch.float64")
        if not data.is_floating_point():
            raise UserError(f"optimal denoiser: data.dtype={data.dtype} must be floating point; scale images first")
        if data.ndim < 2 or data.numel() == 0:
            raise UserError(f"optimal denoiser: data.shape={tuple(data.shape)} must be (N, ...) with N >= 1")
        if not bool(torch.isfinite(data).all()):
            raise UserError("optimal denoiser: data hold NaN or infinite values; remove those images")
        if data.device.type == "cpu":
            size = 2 * data.numel() * dtype.itemsize
            require_memory(
                size, f"optimal denoiser: data of {tuple(data.shape)} in {dtype}", "use fewer or smaller images"
            )
        flat = data.detach().reshape(len(data), -1).to(dtype)
        self.mean_image = flat.mean(0, dtype=torch.float64).to(dtype)
        self.centred = flat - self.mean_image
        self._half_square = self.centred.square().sum(1).mul_(-0.5)
        self._radius = float(self._half_square.min().mul(-2).sqrt())
        rows = max(1, memory_budget // (2 * len(flat) * flat.element_size()))
        self._chunk_rows = min(rows, _CPU_ROWS) if flat.device.type == "cpu" else rows

    def __len__(self) -> int:
        return len(self.centred)

    def clean(self, index: Tensor) -> Tensor:
        """Return data points by index, flattened: (B,) -> (B, D)."""
        return self.centred[index] + self.mean_image

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return the posterior mean E[y | y + sigma n = x].

        Args:
            x: unscaled noisy data (B, ...), of the data's shape per row, any float dtype and device.
            sigma: a float or (B,), >= 0, in the data's units. Zero gives the nearest data point (the mean of several at the same
                distance), infinity the mean image.
            cond: ignored: the posterior is over the whole data set, whatever the label.

        Returns:
            Same shape, dtype and device as x.

        Raises:
            UserError: if x does not fit the data or is not finite, or sigma is negative, NaN or not one per row.
        """
        flat, sigma = self._centre(x), sigma_rows(x, sigma)
        if not bool((sigma >= 0).all()):
            raise UserError("optimal denoiser: sigma must be >= 0 and not NaN")
        sigma = sigma.to(flat)
        mean = torch.empty_like(flat)
        with torch.autocast(flat.device.type, enabled=False):
            for rows in self._chunks(len(flat)):
                torch.mm(self._weights(flat[rows], sigma[rows]), self.centred, out=mean[rows])
            for row in (sigma < _ZERO_SIGMA).nonzero().flatten().tolist():
                mean[row] = self._nearest(flat[row])
        return mean.add_(self.mean_image).reshape(x.shape).to(x)

    def _centre(self, x: Tensor) -> Tensor:
        """Return x flattened, on the data's device and minus the mean image."""
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.centred.shape[1]:
            raise UserError(
                f"optimal denoiser: x.shape={tuple(x.shape)} does not fit data of {self.centred.shape[1]} values a row"
            )
        flat = x.detach().reshape(len(x), self.centred.shape[1]).to(self.centred) - self.mean_image
        if not bool(torch.isfinite(flat).all()):
            raise UserError("optimal denoiser: x holds NaN or infinite values")
        return flat

    def _chunks(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self._chunk_rows) for start in range(0, count, self._chunk_rows))

    def _scores(self, x: Tensor) -> Tensor:
        """Return x·y_i - ||y_i||²/2 = (||x||² - ||x - y_i||²)/2 for centred x: (B, D) -> (B, N)."""
        return torch.addmm(self._half_square, x, self.centred.T)

    def _weights(self, x: Tensor, sigma: Tensor) -> Tensor:
        """Return the posterior weights (B, N): softmax of score / sigma² (which subtracts each row's maximum)."""
        precision = sigma.clamp(min=_ZERO_SIGMA).pow_(-2)
        return torch.softmax(self._scores(x).mul_(precision[:, None]), dim=1)

    def _nearest(self, x: Tensor) -> Tensor:
        """Return the mean of the data points nearest to centred x, (D,) -> (D,).

        Expanded squares select the near candidates. The candidates' distances are then computed directly, so only ties
        within the rounding of x itself remain.
        """
        eps = torch.finfo(x.dtype).eps
        scale = float(x.norm()) + self._radius
        scores = self._scores(x[None])[0]
        near = (scores >= scores.max() - (8 + math.sqrt(len(x))) * eps * scale**2).nonzero().flatten()
        distance = (self.centred[near].double() - x.double()).norm(dim=1)
        return self.centred[near[distance <= distance.min() + 4 * eps * scale]].mean(0)
