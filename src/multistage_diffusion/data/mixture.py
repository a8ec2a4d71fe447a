"""A mixture of isotropic Gaussians, with its optimal denoiser in closed form."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import Conditioning, as_float64, sigma_rows
from ..errors import UserError
from ..rng import normal, uniform


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """The density sum_j w_j N(mu_j, sd_j² I) and its exact `Denoiser`.

    With noise of standard deviation sigma, component j has variance v_j = sd_j² + sigma². Therefore
    E[y | x] = sum_j r_j (mu_j + (sd_j² / v_j) (x - mu_j)) with r_j ~ w_j N(x; mu_j, v_j I). Computed in float64.

    Attributes:
        weights: (J,), positive; scaled to sum to 1.
        means: (J, D).
        stds: (J,), positive.

    Raises:
        UserError: if shapes disagree, or weights or stds are not positive and finite.
    """

    weights: Tensor
    means: Tensor
    stds: Tensor

    def __post_init__(self) -> None:
        for name in ("weights", "means", "stds"):
            object.__setattr__(self, name, as_float64(getattr(self, name)))
        if self.means.ndim != 2:
            raise UserError(f"mixture: means of shape {tuple(self.means.shape)} must be (J, D)")
        for name in ("weights", "stds"):
            value = getattr(self, name)
            if value.shape != self.means.shape[:1]:
                raise UserError(f"mixture: {name} of shape {tuple(value.shape)} must be ({len(self.means)},)")
            if not bool(((value > 0) & torch.isfinite(value)).all()):
                raise UserError(f"mixture: {name}={value.tolist()} must be positive and finite")
        object.__setattr__(self, "weights", self.weights / self.weights.sum())

    def __call__(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return E[y | y + sigma n = x].

        Args:
            x: (B, D), or (B, C, H, W) with C·H·W = D.
            sigma: a float or (B,), >= 0.
            cond: ignored; the mixture has no classes.

        Returns:
            The posterior mean, same shape, dtype and device as x.
        """
        offsets, log_joint = self._log_joint(x, sigma)
        responsibility = torch.softmax(log_joint, dim=1)
        variance = self.stds.to(x.device) ** 2
        gain = variance / (variance + sigma_rows(x, sigma)[:, None] ** 2)
        shrunk = self.means.to(x.device) + gain[:, :, None] * offsets
        return torch.einsum("bj,bjd->bd", responsibility, shrunk).reshape(x.shape).to(x.dtype)

    def sample(self, n: int, seed: int) -> Tensor:
        """Draw n points, float64 (n, D); point i depends only on (seed, i)."""
        rows = torch.arange(n, device=self.means.device)
        u = uniform(("mixture", "component", seed), rows, 1)[:, 0]
        cumulative = torch.cumsum(self.weights, 0)
        component = torch.bucketize(u, cumulative, right=True).clamp(max=len(self.weights) - 1)
        noise = normal(("mixture", "noise", seed), rows, self.means.shape[1:], torch.float64)
        return self.means[component] + self.stds[component, None] * noise

    def _log_joint(self, x: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return x - mu_j, (B, J, D), and ln w_j N(x; mu_j, v_j I), (B, J)."""
        dimensions = self.means.shape[1]
        flat = x.flatten(1).to(torch.float64)
        if flat.shape[1] != dimensions:
            raise UserError(f"mixture: x of shape {tuple(x.shape)} must have {dimensions} values per row")
        offsets = flat[:, None] - self.means.to(x.device)
        variance = self.stds.to(x.device) ** 2 + sigma_rows(x, sigma)[:, None] ** 2
        squares = offsets.square().sum(dim=2)
        log_normal = -0.5 * (squares / variance + dimensions * torch.log(2.0 * math.pi * variance))
        return offsets, torch.log(self.weights.to(x.device)) + log_normal
