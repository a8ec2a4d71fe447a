from __future__ import annotations

import math

import pytest
import torch

from multistage_diffusion.config import OptimizerConfig
from multistage_diffusion.training.optimizer import learning_rate, make_optimizer


def test_the_learning_rate_rises_stays_and_falls():
    settings = OptimizerConfig(lr=0.1, warmup_steps=2, decay_after=4)
    found = [learning_rate(settings, step) for step in (0, 1, 3, 4, 15, 399)]
    assert found == pytest.approx([0.05, 0.1, 0.1, 0.1 * math.sqrt(4 / 5), 0.05, 0.01])
    assert learning_rate(OptimizerConfig(lr=0.1, warmup_steps=0), 10**9) == 0.1


@pytest.mark.parametrize(("kind", "made"), [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_the_optimiser_takes_every_parameter_and_every_number(kind, made):
    module = torch.nn.Linear(2, 3)
    settings = OptimizerConfig(kind=kind, lr=0.3, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.2)
    optimizer = make_optimizer(settings, module)
    assert type(optimizer) is made
    (group,) = optimizer.param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in module.parameters()]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.3, (0.5, 0.6), 1e-3, 0.2)
