from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from multistage_diffusion.training.ema import EMA, PowerEMA, ema_decay, power_decay, power_exponent


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


def profile(exponent: float, times: np.ndarray, end: float) -> np.ndarray:
    """Return the power-function profile, as a reader of the paper would write it."""
    return (exponent + 1) * times**exponent / end ** (exponent + 1)


@pytest.mark.parametrize("sigma_rel", [0.001, 0.01, 0.05, 0.1, 0.2, 0.288])
def test_the_exponent_gives_a_profile_of_this_width(sigma_rel):
    exponent = power_exponent(sigma_rel)
    times = (np.arange(2_000_000) + 0.5) / 2_000_000
    density = profile(exponent, times, 1.0)
    mean = (times * density).mean()
    assert density.mean() == pytest.approx(1.0, rel=1e-6)
    assert np.sqrt(((times - mean) ** 2 * density).mean()) == pytest.approx(sigma_rel, rel=1e-6)


def test_the_exponents_of_the_paper_s_two_profiles():
    assert power_exponent(0.05) == pytest.approx(16.97, abs=0.005)
    assert power_exponent(0.10) == pytest.approx(6.94, abs=0.005)


@pytest.mark.parametrize("sigma_rel", [0.02, 0.05, 0.1, 0.28])
def test_a_power_average_is_the_profile_s_integral_over_weights_that_are_constant_between_steps(sigma_rel):
    steps, fine = 150, 4000
    path = np.random.default_rng(0).normal(size=(steps, 6)).cumsum(0)
    module = nn.Linear(2, 2, dtype=torch.float64)
    ema = PowerEMA(
        module, sigma_rel, nn.Linear(2, 2, dtype=torch.float64)
    )  # holds others: the first step replaces them
    for step, values in enumerate(path):
        with torch.no_grad():
            module.weight.copy_(torch.from_numpy(values[:4].reshape(2, 2)))
            module.bias.copy_(torch.from_numpy(values[4:]))
        ema.update(32, 32 * step)
        if step == 0:
            assert torch.equal(ema.module.weight, module.weight)
    times = (np.arange(steps * fine) + 0.5) / fine
    weights = (profile(power_exponent(sigma_rel), times, steps) / fine).reshape(steps, fine).sum(1)
    expected = weights @ path
    found = torch.cat([p.flatten() for p in ema.module.parameters()]).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)  # of the sum over times


def test_the_decay_of_late_steps_is_exact():
    assert power_decay(1, 5.0) == 0.0
    assert 1 - power_decay(10**9, 16.0) == pytest.approx(17e-9, rel=1e-6)
