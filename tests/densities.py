"""Densities in closed form, as oracles."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from multistage_diffusion.data.mixture import GaussianMixture


def log_density(mixture: GaussianMixture, x: Tensor, sigma: Tensor) -> Tensor:
    """Return the log density of y + sigma n at x, float64 (B,), for y from a mixture, x (B, D) and sigma (B,)."""
    spread = torch.sqrt(mixture.stds**2 + sigma.double()[:, None] ** 2)
    means = mixture.means.expand(len(x), *mixture.means.shape)
    components = Independent(Normal(means, spread[:, :, None].expand_as(means)), 1)
    weights = Categorical(mixture.weights.expand(len(x), -1))
    found: Tensor = MixtureSameFamily(weights, components).log_prob(x.double())
    return found
