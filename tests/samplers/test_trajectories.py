"""What a trajectory asks of a denoiser, and when the host waits for the device; solvers are in test_solvers.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.contracts import Conditioning, sigma_rows
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.samplers import make_plan, sample, start_noise, step_noise
from multistage_diffusion.samplers.guidance import Guided, Thresholded
from multistage_diffusion.schedules.edm import EDM

SOLVERS: list[dict[str, Any]] = [
    {"solver": "dpm"},
    {"solver": "dpm++", "method": "multistep"},
    {"solver": "ddim", "eta": 1.0},
    {"solver": "heun", "churn": 5.0},
]
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.bincount.default, aten.nonzero.default, aten.equal.default}


class Waits(TorchDispatchMode):
    """Notes the operations for whose result the host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in WAITS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", SOLVERS, ids=lambda case: case["solver"])
@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_the_host_waits_once_at_the_end_and_never_in_between(tiny_config, case, weight):
    network = build_denoiser(tiny_config()).eval()
    plan = make_plan(SamplingConfig(**case, calls=9, sigma_min=0.05, sigma_max=10.0), EDM())
    assert {network.stages.index_of(sigma) for sigma in plan.calls} == {0, 1, 2}
    indices, cond = torch.arange(3), Conditioning(labels=torch.tensor([0, 1, 2]))
    start, noise = start_noise(0, indices, (1, 4, 4), plan), step_noise(0, indices, (1, 4, 4))
    # without labels: on the CPU, where nothing is waited for, networks check them
    denoiser = Thresholded(Guided(lambda x, sigma, cond: network(x, sigma), weight, (0.1, 2.0)), 0.9)
    with Waits() as waits:
        sample(denoiser, start, plan, cond, noise=noise)
    assert waits.seen == ["aten._local_scalar_dense.default"]  # whether the samples are finite
    with Waits() as waits, torch.no_grad():
        network(start, torch.full((3,), 0.3, dtype=torch.float64))
    assert len(waits.seen) > 1  # of one sigma per row the stages are asked for


def test_a_plain_function_is_told_a_float():
    plan = make_plan(SamplingConfig(solver="heun", calls=9, sigma_min=0.05, sigma_max=10.0), EDM())
    start = start_noise(0, torch.arange(3), (1, 4, 4), plan)
    seen = []

    def rows(x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        seen.append(sigma)
        return x / (1 + sigma_rows(x, sigma).view(-1, 1, 1, 1).to(x.dtype) ** 2)

    end = sample(lambda x, sigma, cond=None: x / (1 + sigma**2), start, plan)
    torch.testing.assert_close(sample(rows, start, plan), end)
    assert seen == list(plan.calls)
    assert {type(sigma) for sigma in seen} == {float}


class Wrapper(nn.Module):
    """Forwards all attributes to what it wraps, as torch.compile's modules do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        object.__setattr__(self, "inner", inner)
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.inner(*args, **kwargs)


def test_a_wrapped_denoiser_is_not_gone_past(tiny_config):
    network = build_denoiser(tiny_config(network__num_classes=3)).double().eval()
    plan = make_plan(SamplingConfig(calls=8, sigma_min=0.05, sigma_max=10.0, denoise_last="never"), EDM())
    start, cond = start_noise(0, torch.arange(3), (1, 4, 4), plan, torch.float64), Conditioning(labels=torch.arange(3))
    wrapped = Wrapper(network)
    end = sample(Guided(wrapped, 2.0), start, plan, cond)
    assert wrapped.calls == 8
    assert torch.equal(end, sample(Guided(network, 2.0), start, plan, cond))


def test_a_sigma_on_a_stage_edge_is_of_the_upper_stage(tiny_config):
    """In float32 the edge 0.2 is above 0.2; there each row would be asked for, and the wrong decoder taken."""
    network = build_denoiser(tiny_config()).eval()
    assert network.stages.interior[0] == 0.2
    used = []
    network.network.register_forward_pre_hook(lambda module, args: used.append(list(args[2])))
    for sigma in (math.nextafter(0.2, 0), 0.2):
        network(torch.zeros(2, 1, 4, 4), sigma)
        network(torch.zeros(2, 1, 4, 4), torch.full((2,), sigma, dtype=torch.float64))
    assert used == [[2, 0, 0]] * 2 + [[0, 2, 0]] * 2
