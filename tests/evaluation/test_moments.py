from __future__ import annotations

import torch

from multistage_diffusion.evaluation.moments import moments


def features(rows: int, dims: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, dims, generator=g, dtype=torch.float64)
    return x @ torch.randn(dims, dims, generator=g, dtype=torch.float64) + 5.0


def test_moments_are_mean_and_unbiased_covariance() -> None:
    x = features(50, 4, 0)
    found = moments(x)
    assert torch.allclose(found.mean, x.mean(dim=0))
    assert torch.allclose(found.covariance, torch.cov(x.T), rtol=1e-12)
    assert found.count == 50
