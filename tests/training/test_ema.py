from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from multistage_diffusion.training.ema import EMA, ema_decay


def test_an_old_weight_counts_half_after_the_half_life():
    total = 1.0
    for i in range(50):
        total *= ema_decay(20, 20 * i, halflife=1000.0, rampup=0.0)
    assert total == pytest.approx(0.5)


def test_decay_counts_images_not_steps():
    assert ema_decay(64, 10**9, 5000.0, 0.05) == pytest.approx(ema_decay(16, 10**9, 5000.0, 0.05) ** 4)


def test_ramp_up_shortens_the_half_life_at_the_start():
    assert ema_decay(32, 0, 1e6, 0.05) == 0.0  # the first iteration copies
    assert ema_decay(32, 10_000, 1e6, 0.05) == pytest.approx(2 ** (-32 / 500))
    assert ema_decay(32, 10**8, 1e6, 0.05) == pytest.approx(2 ** (-32 / 1e6))
    assert ema_decay(32, 0, 1e6, 0.0) == pytest.approx(2 ** (-32 / 1e6))


def constant(value: float) -> nn.Linear:
    module = nn.Linear(2, 3)
    for p in module.parameters():
        nn.init.constant_(p, value)
    return module.double()


def test_average_of_a_jump_follows_the_closed_form():
    module = constant(1.0)
    ema = EMA(module, halflife=100.0, rampup=0.0)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(5.0)
    for step in range(30):
        ema.update(10, 10 * step)
    expected = 5.0 + (1.0 - 5.0) * 0.5**3  # 300 images are three half-lives
    for p in ema.module.parameters():
        torch.testing.assert_close(p, torch.full_like(p, expected), rtol=1e-12, atol=0)


def test_equals_the_parameter_by_parameter_loop_and_copies_buffers():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    ema = EMA(module, halflife=300.0, rampup=0.1)
    slow = copy.deepcopy(module)
    for step in range(12):
        with torch.no_grad():
            for p in module.parameters():
                p.add_(torch.randn_like(p))
        module(torch.randn(5, 3, dtype=torch.float64))  # moves the buffers
        ema.update(16, 16 * step)
        halflife = max(min(300.0, 0.1 * 16 * step), 1e-8)
        decay = 0.5 ** (16 / halflife)
        with torch.no_grad():
            for s, p in zip(slow.parameters(), module.parameters(), strict=True):
                s.copy_(decay * s + (1 - decay) * p)
    for mine, theirs in zip(ema.module.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(ema.module.buffers(), module.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_the_average_is_a_separate_module_in_evaluation_mode():
    module = constant(1.0).train()
    ema = EMA(module, 100.0, 0.0)
    assert not ema.module.training
    assert module.training
    assert not any(p.requires_grad for p in ema.module.parameters())
    assert all(p.requires_grad for p in module.parameters())
    ema.update(10, 0)
    assert module.weight[0, 0].item() == 1.0
