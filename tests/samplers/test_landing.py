"""With the optimal denoiser of the digits, every sampler ends on training images: the whole chain, without a network."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.data import to_float
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.evaluation import nearest
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.samplers import make_plan, sample, start_noise, step_noise
from multistage_diffusion.schedules import NoiseSchedule
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.vp import VP

DPM = [
    {"solver": solver, "method": method, "order": order}
    for solver in ("dpm", "dpm++")
    for method in ("singlestep", "multistep")
    for order in (1, 2, 3)
]
OTHERS: list[dict[str, Any]] = [
    {"solver": "ddim"},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "heun", "spacing": "edm"},
    {"solver": "heun", "spacing": "edm", "churn": 10.0},
]


@pytest.fixture(scope="module")
def digits() -> torch.Tensor:
    return to_float(open_data("digits").array())


@pytest.mark.parametrize("schedule", [VP(), EDM()], ids=lambda s: s.kind)
@pytest.mark.parametrize("settings", [*DPM, *OTHERS], ids=lambda s: "-".join(map(str, s.values())))
def test_every_sampler_lands_on_digits(digits: torch.Tensor, settings: dict[str, Any], schedule: NoiseSchedule) -> None:
    plan = make_plan(SamplingConfig(calls=50, **settings), schedule)
    assert len(plan.calls) <= 50
    index = torch.arange(32)
    start = start_noise(0, index, digits.shape[1:], plan, torch.float64)
    noise = step_noise(0, index, digits.shape[1:], torch.float64)
    end = sample(OptimalDenoiser(digits, dtype=torch.float64), start, plan, noise=noise)
    distance, which = nearest(end.flatten(1), digits.double().flatten(1))
    assert float(distance.max()) / digits[0].numel() ** 0.5 < 1e-2  # root mean square per pixel
    assert len(which.unique()) > 16  # not all on one image
