"""Training densities against exact distributions."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from multistage_diffusion.schedules import LogNormal, SigmaPrior, UniformTime
from multistage_diffusion.schedules.discrete import Discrete, UniformSteps
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stages import Stages

F64 = torch.float64
INF = math.inf

PRIOR_CASES = [
    UniformTime(),
    UniformTime(schedule=VE()),
    UniformTime(schedule=EDM()),
    UniformTime(schedule=RectifiedFlow()),
    UniformSteps(),
    UniformSteps(schedule=Discrete(steps=7)),
    LogNormal(),
    LogNormal(p_mean=0.0, p_std=1.0),
]
PARTITIONS = [(), (2.5103, 7.6577), (1e-9, 0.05, 0.3, 1.0, 2.5103, 40.0, 1e6)]
U_GRID = torch.cat((torch.tensor([0.0, 2.0**-53, 1e-12], dtype=F64), torch.arange(1, 20_000, dtype=F64) / 20_000,
                    torch.tensor([1 - 1e-12, 1 - 2.0**-53], dtype=F64)))  # fmt: skip


@pytest.mark.parametrize("prior", PRIOR_CASES, ids=repr)
@pytest.mark.parametrize("interior", PARTITIONS)
def test_masses_of_a_partition_sum_to_one(prior: SigmaPrior, interior: tuple[float, ...]) -> None:
    stages = Stages(interior)
    masses = [prior.mass(*stages.interval(k)) for k in range(len(stages))]
    assert min(masses) >= 0.0
    assert sum(masses) == pytest.approx(1.0, abs=1e-14)


def test_published_edm_masses() -> None:
    stages, prior = Stages((2.5103, 7.6577)), LogNormal()
    percent = [100 * prior.mass(*stages.interval(k)) for k in range(3)]
    assert percent == [pytest.approx(96.1, abs=0.05), pytest.approx(3.5, abs=0.05), pytest.approx(0.35, abs=0.005)]


def test_log_normal_mass_equals_erfc_in_both_tails() -> None:
    prior = LogNormal()
    for z in (-30.0, -8.0, -1.0, 0.0, 1.0, 8.0, 30.0):
        edge = math.exp(prior.p_mean + prior.p_std * z)
        assert prior.mass(0.0, edge) == pytest.approx(0.5 * math.erfc(-z / math.sqrt(2)), rel=1e-11)
        assert prior.mass(edge, INF) == pytest.approx(0.5 * math.erfc(z / math.sqrt(2)), rel=1e-11)


def test_uniform_masses_are_lengths_of_time() -> None:
    vp = VP()
    assert UniformTime().mass(vp.edge_sigma(0.2), vp.edge_sigma(0.5)) == pytest.approx(0.3 / 0.999, rel=1e-13)
    assert UniformTime().mass(vp.edge_sigma(1e-4), vp.edge_sigma(0.5)) == pytest.approx(0.499 / 0.999, rel=1e-13)
    steps = UniformSteps()
    low, high = steps.schedule.edge_sigma(442), steps.schedule.edge_sigma(631)
    assert [steps.mass(0.0, low), steps.mass(low, high), steps.mass(high, INF)] == [0.442, 0.189, 0.369]


@pytest.mark.parametrize("prior", PRIOR_CASES, ids=repr)
@pytest.mark.parametrize("interior", PARTITIONS)
def test_every_draw_lies_in_its_stage(prior: SigmaPrior, interior: tuple[float, ...]) -> None:
    stages = Stages(interior)
    for k in range(len(stages)):
        low, high = stages.interval(k)
        if prior.mass(low, high) == 0:
            continue
        draws = prior.sample_within(U_GRID, low, high)
        assert draws.dtype == F64
        assert bool(torch.isfinite(draws).all())
        assert bool((draws > 0).all())
        assert bool((draws >= low).all())
        assert bool((draws < high).all())
        assert bool((stages.index(draws) == k).all())
        assert bool((draws.diff() >= 0).all())  # the inverse of a CDF rises


@pytest.mark.parametrize("z", [8.0, 20.0, 36.0])
@pytest.mark.parametrize("side", [-1.0, 1.0])
def test_log_normal_tails_neither_overflow_nor_collapse(z: float, side: float) -> None:
    prior = LogNormal()
    edge = math.exp(prior.p_mean + prior.p_std * side * z)
    low, high = (0.0, edge) if side < 0 else (edge, INF)
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 1 - 2.0**-53], dtype=F64)
    draws = prior.sample_within(u, low, high)
    assert bool(torch.isfinite(draws).all())
    assert bool(((draws >= low) & (draws < high)).all())
    # the share of the tail's mass below each inner draw is u again
    shares = torch.tensor([prior.mass(low, float(d)) / prior.mass(low, high) for d in draws[1:4]], dtype=F64)
    torch.testing.assert_close(shares, u[1:4], rtol=1e-9, atol=0)


def cdf_within(prior: SigmaPrior, draws: Tensor, low: float, high: float) -> Tensor:
    """P(sigma <= draw | [low, high)), from formulas of the distribution itself."""
    if isinstance(prior, LogNormal):

        def cdf(v: float) -> float:
            return 0.5 * math.erfc(-(math.log(v) - prior.p_mean) / prior.p_std / math.sqrt(2)) if v > 0 else 0.0
    else:
        assert isinstance(prior, UniformTime)
        s = prior.schedule

        def cdf(v: float) -> float:
            t = s.t_max if v == INF else float(s.time(v)) if v > 0 else s.t_min
            return (min(max(t, s.t_min), s.t_max) - s.t_min) / (s.t_max - s.t_min)

    at_low, at_high = cdf(low), cdf(high)
    return torch.tensor([(cdf(float(d)) - at_low) / (at_high - at_low) for d in draws], dtype=F64)


@pytest.mark.parametrize("prior", [p for p in PRIOR_CASES if not isinstance(p, UniformSteps)], ids=repr)
@pytest.mark.parametrize("interval", [(0.0, INF), (0.05, 0.9), (2.5103, 7.6577), (2.5103, INF), (0.0, 0.4)])
def test_empirical_distribution_kolmogorov_smirnov(prior: SigmaPrior, interval: tuple[float, float]) -> None:
    u = torch.rand(2000, dtype=F64, generator=torch.Generator().manual_seed(3))
    shares = cdf_within(prior, prior.sample_within(u, *interval), *interval).sort().values
    ranks = torch.arange(1, 2001, dtype=F64) / 2000
    distance = torch.maximum((shares - ranks).abs(), (shares - ranks + 1 / 2000).abs()).max()
    assert float(distance) < 1.95 / math.sqrt(2000)  # p < 1e-3 if the distribution is right; the seed is fixed


@pytest.mark.parametrize("prior", [UniformTime(), LogNormal(), UniformSteps()], ids=repr)
def test_drawing_a_stage_first_equals_drawing_from_the_whole(prior: SigmaPrior) -> None:
    # u of the whole density lands in stage k exactly when u lies in the stage's slice of [0, 1), and at the same sigma
    stages = Stages((0.3, 2.5103, 7.6577))
    u = (torch.arange(4000, dtype=F64) + 0.5) / 4000
    whole = prior.sample(u)
    start = 0.0
    for k in range(len(stages)):
        low, high = stages.interval(k)
        mass = prior.mass(low, high)
        mine = stages.index(whole) == k
        assert torch.equal(mine, (u >= start) & (u < start + mass))
        within = prior.sample_within((u[mine] - start) / mass, low, high)
        torch.testing.assert_close(within, whole[mine], rtol=1e-9, atol=0)
        start += mass


@pytest.mark.parametrize(
    ("prior", "interval"),
    [
        (UniformTime(), (1e6, INF)),
        (UniformTime(), (0.0, 1e-3)),
        (UniformTime(), (1.0, 1.0)),
        (UniformTime(), (2.0, 1.0)),
        (UniformSteps(), (0.0, 0.01)),
        (UniformSteps(), (1e3, INF)),
        (UniformSteps(), (2.1475, 2.148)),
        (LogNormal(), (1.0, 1.0)),
        (LogNormal(), (2.0, 1.0)),
        (LogNormal(), (1e300, INF)),
    ],
)
def test_an_interval_without_mass_is_refused(prior: SigmaPrior, interval: tuple[float, float]) -> None:
    assert prior.mass(*interval) == 0.0
    with pytest.raises(ValueError, match=f"holds no mass of the {prior.kind} prior"):
        prior.sample_within(torch.tensor([0.5], dtype=F64), *interval)


def test_uniform_steps_hit_each_integer_step_equally_often() -> None:
    prior = UniformSteps()
    schedule = prior.schedule
    low, high = schedule.edge_sigma(442), schedule.edge_sigma(631)
    u = (torch.arange(3 * 189, dtype=F64) + 0.5) / (3 * 189)
    draws = prior.sample_within(u, low, high)
    assert torch.equal(draws, schedule.sigmas[442:631].repeat_interleave(3))
    steps = schedule.time(draws)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-10)


def test_uniform_steps_agree_with_stages_when_an_edge_is_exactly_a_step() -> None:
    # an edge at a step's own sigma belongs to the upper stage, whatever log and exp round to
    prior = UniformSteps()
    for k in range(1, 1000):
        edge = float(prior.schedule.sigmas[k])
        assert prior.mass(0.0, edge) == k / 1000
        assert float(prior.sample_within(torch.tensor([0.0], dtype=F64), edge, INF)) == edge


def test_priors_are_values() -> None:
    for prior in PRIOR_CASES:
        assert dataclasses.replace(prior) == prior  # type: ignore[type-var]
        assert hash(dataclasses.replace(prior)) == hash(prior)  # type: ignore[type-var]
