"""What solvers share: the first-order step, and the precision of float32 where states are large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.samplers import make_plan, sample
from multistage_diffusion.samplers.solvers.base import first_order
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow


def test_the_first_order_step_is_eulers_in_sigma() -> None:
    x, denoised = torch.tensor([3.0, -2.0], dtype=torch.float64), torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert torch.allclose(first_order(x, denoised, 0.25), x + (1.0 - 4.0) * (x - denoised) / 4.0, atol=1e-15)
    assert torch.equal(first_order(x, denoised, 0.0), denoised)


def gaussian(x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
    """E[y | y + sigma n] for y of N(0, 1)."""
    return x / (1.0 + sigma**2)


@pytest.mark.parametrize(
    "solver",
    [
        {"solver": "heun"},
        {"solver": "ddim"},
        {"solver": "dpm", "method": "multistep", "order": 2},
        {"solver": "dpm++", "method": "multistep", "order": 2},
    ],
    ids=str,
)
def test_float32_keeps_its_precision_from_a_thousand_times_the_images(solver: dict[str, object]) -> None:
    config = SamplingConfig(**solver, calls=12, spacing="time", sigma_min=0.1, sigma_max=1000.0)  # type: ignore[arg-type]
    plan = make_plan(config, RectifiedFlow())
    noise = 1000.0 * torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    exact = sample(gaussian, noise.double(), plan)
    assert (sample(gaussian, noise, plan) - exact).abs().max() < 1e-6 * exact.abs().max()
