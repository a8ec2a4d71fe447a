"""The Wiener denoiser of a set of images: the optimal denoiser of a Gaussian with their mean and covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contracts import Conditioning, sigma_rows
from ..progress import interruptible
from .gaussian import with_tail


class WienerDenoiser:
    """The Denoiser D(x; sigma) = mu + U diag(g) U^T (x - mu), g_i = lambda_i / (lambda_i + sigma²).

    Directions in which few images show no variance have the mean of the extrapolated eigenvalues (`gaussian.with_tail`).
    All arithmetic is in float64.
    """

    def __init__(self, images: Tensor) -> None:
        """Diagonalise the covariance.

        Args:
            images: (n, ...) floating point, n >= 16, in the units of sigma.
        """
        rows = images.flatten(1).to(torch.float64)
        count, dim = rows.shape
        self.mean = rows.mean(0)
        _, singular, right = interruptible(lambda: torch.linalg.svd(rows - self.mean, full_matrices=False))
        known = min(count - 1, dim)
        values = with_tail(singular[:known] ** 2 / (count - 1), count, dim)
        self.basis, self.values = right[:known].T, values[:known]  # (D, r), (r,)
        self.rest = float(values[known:].mean()) if known < dim else 0.0

    @torch.no_grad()
    def __call__(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return D(x; sigma).

        Args:
            x: unscaled noisy data (B, ...), of the images' shape per row.
            sigma: a float or (B,), >= 0.
            cond: ignored.
        """
        noise = sigma_rows(x, sigma)[:, None] ** 2
        centred = x.flatten(1).to(torch.float64) - self.mean
        inside = centred @ self.basis
        gain, other = self.values / (self.values + noise), self.rest / (self.rest + noise).clamp(min=1e-300)
        answer = self.mean + other * centred + (inside * (gain - other)) @ self.basis.T
        result: Tensor = answer.reshape(x.shape).to(x.dtype)
        return result
