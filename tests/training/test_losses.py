from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from multistage_diffusion.config import TrainingConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.denoisers import MultiStageDenoiser, build_denoiser
from multistage_diffusion.preconditioning.vp_eps import VPEps
from multistage_diffusion.schedules import UniformTime
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.shares import allocate, prior_masses
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import Batch, BatchSource
from multistage_diffusion.training.losses import objective, row_losses, stage_losses, stage_sums, updates
from multistage_diffusion.training.strategies import divided


@pytest.fixture
def denoiser(tiny_config):
    torch.manual_seed(0)
    made = build_denoiser(tiny_config(network__num_classes=3)).double().eval()
    for p in made.parameters():
        nn.init.normal_(p, std=0.2)
    return made


@pytest.fixture
def source(tiny_config, tiny_data):
    return BatchSource(tiny_config(network__num_classes=3), tiny_data(classes=3), torch.device("cpu"))


def double(batch: Batch) -> Batch:
    return dataclasses.replace(batch, y=batch.y.double(), noise=batch.noise.double())


def gradients(module: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("precondition", ["vp-eps", "edm", "velocity"])
def test_stage_losses_are_weighted_denoising_errors(tiny_config, source, precondition):
    config = tiny_config(network__num_classes=3, diffusion__precondition=precondition)
    torch.manual_seed(0)
    denoiser = build_denoiser(config).double().eval()
    batch = double(source.draw(0, (4, 0, 3)))
    sums = [s.item() for s in stage_losses(denoiser, batch)]
    c_out = denoiser.preconditioning.coefficients(batch.sigma).out
    rows = []
    for i in range(7):
        x = (batch.y[i] + batch.sigma[i] * batch.noise[i])[None]
        d = denoiser(x, batch.sigma[i : i + 1], Conditioning(labels=batch.cond.labels[i : i + 1]))
        rows.append((((d[0] - batch.y[i]) ** 2).mean() / c_out[i] ** 2).item())
    assert sums == pytest.approx([sum(rows[:4]), 0.0, sum(rows[4:])], rel=1e-8)


def test_rows_of_stages_that_do_not_count_sum_to_nothing():
    rows = torch.arange(1.0, 6.0, requires_grad=True)
    sums = stage_sums(rows, (2, 0, 3), (True, True, False))
    assert [total.item() for total in sums] == [3.0, 0.0, 0.0]
    torch.stack(sums).sum().backward()
    assert rows.grad.tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_objective_written_out():
    sums = [torch.tensor(v, dtype=torch.float64) for v in (6.0, 0.0, 5.0)]
    value = objective(sums, (0.5, 0.3, 0.2), (3, 0, 4))
    assert float(value) == pytest.approx(0.5 * 6 / 3 + 0.2 * 5 / 4)


def test_one_mixed_pass_has_the_gradient_of_separate_passes(denoiser, source):
    weights, counts = (0.5, 0.3, 0.2), (3, 4, 5)
    objective(stage_losses(denoiser, double(source.draw(1, counts))), weights, counts).backward()
    mixed = gradients(denoiser)
    denoiser.zero_grad()
    for k in range(3):
        alone = tuple(c if j == k else 0 for j, c in enumerate(counts))
        mean = stage_losses(denoiser, double(source.draw(1, alone)))[k] / counts[k]
        (weights[k] * mean).backward()
    assert_close(mixed, gradients(denoiser))


@pytest.mark.parametrize("counts", [(3, 4, 5), (1, 5, 2), (0, 6, 0)])
def test_accumulated_parts_have_the_gradient_of_the_whole(denoiser, source, counts):
    weights = (0.5, 0.3, 0.2)
    found = []
    for parts in (1, 3):
        denoiser.zero_grad()
        total = 0.0
        for part in divided([range(count) for count in counts], parts):
            loss = objective(stage_losses(denoiser, double(source.draw(2, counts, part))), weights, counts)
            loss.backward()
            total += loss.item()
        found.append((total, gradients(denoiser)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    busy = {name for name, g in found[0][1].items() if bool(g.any())}
    used = {name: found[0][1][name] for name in busy}
    assert_close(used, {name: found[1][1][name] for name in busy})
    assert not any(bool(g.any()) for name, g in found[1][1].items() if name not in busy)


# -- an unbiased estimate of the ordinary loss ------------------------------------------------------------------------


class Bent(nn.Module):
    """A network whose squared error is a known function of sigma: F = a(sigma) eps-hat for unit Gaussian data."""

    def __init__(self, schedule: VP) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.schedule = schedule

    def forward(self, scaled, noise, counts, cond=None):
        # for y, n standard normal the scaled x is standard normal too: F = 0.5 x is a poor guess of n
        return 0.5 * scaled


def ordinary_loss(schedule: VP) -> float:
    """E |0.5 s (y + sigma n) - n|² over uniform time, by the trapezoidal rule: 1.25 - s sigma."""
    t = torch.linspace(schedule.t_min, schedule.t_max, 200_001, dtype=torch.float64)
    sigma = schedule.sigma(t)
    return float(torch.trapezoid(1.25 - sigma / torch.sqrt(1 + sigma**2), t) / (schedule.t_max - schedule.t_min))


@pytest.mark.parametrize("shares", [(1 / 3, 1 / 3, 1 / 3), (0.7, 0.2, 0.1), "prior"])
def test_prior_weights_make_the_ordinary_loss_whatever_the_shares(shares):
    schedule, stages = VP(), Stages((0.3, 2.0))
    prior = UniformTime(schedule=schedule)
    masses = prior_masses(stages, prior)
    counts = allocate(60_000, masses if shares == "prior" else shares)
    g = torch.Generator().manual_seed(0)
    sigma = torch.cat(
        [
            prior.sample_within(torch.rand(n, generator=g, dtype=torch.float64), *stages.interval(k))
            for k, n in enumerate(counts)
        ]
    )
    y, noise = (torch.randn(60_000, 1, 2, 2, generator=g, dtype=torch.float64) for _ in range(2))
    denoiser = MultiStageDenoiser(Bent(schedule), stages, VPEps(schedule))
    rows = stage_losses(denoiser, Batch(y, noise, sigma, counts, None))
    estimate = float(objective(rows, masses, counts))
    # a row's error has a standard deviation below 1.3: four standard errors of the stratified mean
    tolerance = 4 * 1.3 * math.sqrt(sum(m**2 / n for m, n in zip(masses, counts, strict=True)))
    assert tolerance < 0.05
    assert estimate == pytest.approx(ordinary_loss(schedule), abs=tolerance)


def test_losses_are_as_precise_as_the_network(tiny_config, tiny_data):
    config = tiny_config(network__dropout=0.0)
    batch = BatchSource(config, tiny_data(), torch.device("cpu")).draw(0, (4, 4, 4))
    denoiser = build_denoiser(config)
    assert row_losses(denoiser, batch).dtype == torch.float32
    assert torch.equal(batch.noisy, batch.y + batch.sigma.float()[:, None, None, None] * batch.noise)
    losses = row_losses(denoiser.double(), batch)
    assert losses.dtype == torch.float64
    y, noise = batch.y.double(), batch.noise.double()
    x = y + batch.sigma[:, None, None, None] * noise
    c = denoiser.preconditioning.coefficients(batch.sigma)
    errors = (denoiser(x, batch.sigma, batch.cond, batch.counts) - y).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, errors / c.out.square(), rtol=1e-10, atol=0)


COUNTS, SHARES, WEIGHTS = (6, 3, 3), (0.5, 0.25, 0.25), (0.2, 0.2, 0.6)


def test_a_mixed_step_trains_all_rows():
    assert list(updates(TrainingConfig(), 7, COUNTS, SHARES, WEIGHTS)) == [(COUNTS, WEIGHTS)]


def test_sequential_steps_see_the_rows_of_the_mixed_step():
    training = TrainingConfig(update_mode="sequential")
    found = list(updates(training, 0, (6, 0, 3), SHARES, WEIGHTS))
    assert found == [((6, 0, 0), WEIGHTS), ((0, 0, 3), WEIGHTS)]
    assert [counts for counts, _ in updates(training, 0, COUNTS, SHARES, WEIGHTS)] == [(6, 0, 0), (0, 3, 0), (0, 0, 3)]


def test_one_stage_mode_draws_stages_by_share_and_weighs_them_back():
    training, drawn = TrainingConfig(update_mode="one-stage"), []
    for step in range(2000):
        ((counts, weights),) = updates(training, step, (12, 12, 12), (0.6, 0.3, 0.1), WEIGHTS)
        (stage,) = (k for k in range(3) if counts[k])
        assert counts[stage] == 12
        assert weights[stage] == pytest.approx((0.2 / 0.6, 0.2 / 0.3, 6.0)[stage])
        drawn.append(stage)
    assert (np.bincount(drawn) / 2000).tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.035)
