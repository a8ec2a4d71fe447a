"""Schedules against 50-digit decimals and published values."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import pytest
import torch

from multistage_diffusion.schedules import (
    PRIORS,
    SCHEDULES,
    LogNormal,
    NoiseSchedule,
    SigmaPrior,
    UniformTime,
    VariancePreserving,
)
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stages import Stages

F64 = torch.float64
INF = math.inf
ALL = [VP(), VP(beta_min=0.0), VP(beta_d=0.0), VE(), EDM(), RectifiedFlow(), Discrete(), Discrete(spacing="linear")]
ALL += [Discrete(spacing="cosine"), Discrete(spacing="given", steps=4, betas=(0.01, 0.3, 0.02, 0.9))]
TIMES = [1e-6, 1e-4, 1e-3, 0.1, 0.442, 0.631, 0.9, 0.999]


def ids(schedule: NoiseSchedule) -> str:
    return repr(schedule)


def vp_decimal(t: float) -> Decimal:
    """sqrt(exp(beta_d t²/2 + beta_min t) - 1) in 50 digits."""
    d, b, t_ = Decimal("19.9"), Decimal("0.1"), Decimal(t)
    return ((d * t_ * t_ / 2 + b * t_).exp() - 1).sqrt()


def ve_decimal(t: float) -> Decimal:
    low, high = Decimal("0.01"), Decimal("50")
    return low * (Decimal(t) * (high / low).ln()).exp()


def flow_decimal(t: float) -> Decimal:
    return Decimal(t) / (1 - Decimal(t))


@pytest.mark.parametrize(
    ("schedule", "exact"),
    [(VP(), vp_decimal), (VE(), ve_decimal), (EDM(), Decimal), (RectifiedFlow(), flow_decimal)],
    ids=["vp", "ve", "edm", "flow"],
)
def test_sigma_equals_fifty_digits(schedule: NoiseSchedule, exact: Callable[[float], Decimal]) -> None:
    with localcontext() as context:
        context.prec = 50
        for t in [*TIMES, schedule.t_min]:
            assert float(schedule.sigma(t)) == pytest.approx(float(exact(t)), rel=1e-14)


@pytest.mark.parametrize("spacing", ["sqrt", "linear"])
def test_discrete_table_equals_fifty_digits(spacing: str) -> None:
    schedule = Discrete(spacing=spacing)
    with localcontext() as context:
        context.prec = 50
        low, high = Decimal(schedule.beta_start), Decimal(schedule.beta_end)
        if spacing == "sqrt":
            low, high = low.sqrt(), high.sqrt()
        alpha_bar = Decimal(1)
        for step in range(1000):
            beta = low + (high - low) * step / 999
            alpha_bar *= 1 - (beta * beta if spacing == "sqrt" else beta)
            if step in (0, 1, 441, 442, 998, 999):
                exact = float(((1 - alpha_bar) / alpha_bar).sqrt())
                assert float(schedule.sigma(float(step))) == pytest.approx(exact, rel=1e-12)
                assert float(schedule.scale(exact)) == pytest.approx(float(alpha_bar.sqrt()), rel=1e-12)


@pytest.mark.parametrize("schedule", ALL, ids=ids)
def test_sigma_to_time_and_back(schedule: NoiseSchedule) -> None:
    near = [1e-3, 1e-2, 0.3, 0.77, 1.0]
    times = torch.tensor([schedule.t_min + f * (schedule.t_max - schedule.t_min) for f in near], dtype=F64)
    sigmas = schedule.sigma(times)
    assert sigmas.dtype == F64
    assert bool((sigmas.diff() > 0).all())
    torch.testing.assert_close(schedule.sigma(schedule.time(sigmas)), sigmas, rtol=1e-12, atol=0)
    torch.testing.assert_close(schedule.time(sigmas), times, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "schedule", [VP(), VP(beta_min=0.0), VP(beta_d=0.0), EDM(), RectifiedFlow(sigma_max=1e7)], ids=ids
)
@pytest.mark.parametrize("t", [1e-9, 1e-6, 1e-4, 0.5, 1 - 1e-6, 1 - 1e-7])
def test_time_is_exact_at_both_ends(schedule: NoiseSchedule, t: float) -> None:
    assert float(schedule.time(schedule.sigma(t))) == pytest.approx(t, rel=1e-12)


@pytest.mark.parametrize("schedule", [VE(), Discrete()], ids=ids)
@pytest.mark.parametrize("t", [1e-6, 0.5, 1 - 1e-6, 1.0])
def test_time_is_exact_as_far_as_sigma_can_hold_it(schedule: NoiseSchedule, t: float) -> None:
    # a relative rounding of sigma by 2^-53 alone moves these times by about 1e-16 absolute
    assert float(schedule.time(schedule.sigma(t))) == pytest.approx(t, rel=0, abs=4e-15)


@pytest.mark.parametrize("schedule", [VP(), VP(beta_min=0.0), EDM(), RectifiedFlow(), Discrete()], ids=ids)
def test_no_noise_is_time_zero(schedule: NoiseSchedule) -> None:
    assert float(schedule.time(0.0)) == 0.0
    assert schedule.edge_time(0.0) == 0.0


@pytest.mark.parametrize("schedule", ALL, ids=ids)
def test_log_snr_relations(schedule: NoiseSchedule) -> None:
    span = schedule.t_max - schedule.t_min
    times = torch.linspace(schedule.t_min + 0.01 * span, schedule.t_max, 9, dtype=F64)
    log_snr = schedule.log_snr(times)
    torch.testing.assert_close(log_snr, torch.log(1.0 / schedule.sigma(times) ** 2), rtol=1e-12, atol=1e-12)


def test_scale_and_sigma_are_the_coefficients_of_the_kernel() -> None:
    t = torch.tensor([0.01, 0.4, 0.95], dtype=F64)
    vp, flow = VP(), RectifiedFlow()
    # VP: signal² + noise² = 1; rectified flow: signal + noise = 1
    s = vp.scale(vp.sigma(t))
    torch.testing.assert_close(s**2 + (s * vp.sigma(t)) ** 2, torch.ones(3, dtype=F64), rtol=1e-14, atol=0)
    torch.testing.assert_close(s, torch.exp(-0.5 * (19.9 * t**2 / 2 + 0.1 * t)), rtol=1e-13, atol=0)
    s = flow.scale(flow.sigma(t))
    torch.testing.assert_close(s, 1 - t, rtol=1e-13, atol=0)
    torch.testing.assert_close(s * flow.sigma(t), t, rtol=1e-13, atol=0)
    for schedule in (VE(), EDM()):
        assert torch.equal(schedule.scale(t), torch.ones(3, dtype=F64))


def test_cosine_and_given_betas_written_out() -> None:
    def kept(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [min(0.999, 1 - kept((i + 1) / 50) / kept(i / 50)) for i in range(50)]
    alpha_bar = torch.tensor([math.prod(1 - beta for beta in betas[: i + 1]) for i in range(50)], dtype=F64)
    expected = torch.sqrt((1 - alpha_bar) / alpha_bar)
    assert betas[-1] == 0.999
    torch.testing.assert_close(Discrete(steps=50, spacing="cosine").sigmas, expected, rtol=1e-10, atol=0)
    given = Discrete(steps=50, spacing="given", betas=tuple(betas))
    torch.testing.assert_close(given.sigmas, expected, rtol=1e-10, atol=0)


def test_published_edges() -> None:
    vp = VP()
    assert vp.edge_sigma(0.442) == pytest.approx(2.5103, abs=5e-5)
    assert vp.edge_sigma(0.6308) == pytest.approx(7.405, abs=5e-4)
    assert vp.edge_time(7.6577) == pytest.approx(0.636, abs=5e-5)
    assert float(Discrete().sigma(442.0)) == pytest.approx(2.153, abs=5e-4)


def test_start_std() -> None:
    for schedule in (VP(), Discrete()):
        sigma = float(schedule.sigma(schedule.t_max))
        assert schedule.initial_noise_std(sigma) * float(schedule.scale(sigma)) == pytest.approx(1.0, rel=1e-14)
    for schedule in (VE(), EDM(), RectifiedFlow()):
        assert schedule.initial_noise_std(80.0) == 80.0


def test_rectified_flow_stops_at_sigma_max() -> None:
    flow = RectifiedFlow(sigma_max=500.0)
    assert flow.t_max == pytest.approx(500 / 501, rel=1e-15)
    times = torch.tensor([flow.t_max, 0.9999, 1.0, 1.5], dtype=F64)
    torch.testing.assert_close(flow.sigma(times), torch.full((4,), 500.0, dtype=F64), rtol=1e-12, atol=0)
    assert float(flow.sigma(times).max()) <= 500.0


def test_float32_and_integer_times_are_computed_in_float64() -> None:
    t = torch.tensor([0.25, 0.5])
    assert torch.equal(VP().sigma(t), VP().sigma(t.to(F64)))
    assert torch.equal(
        Discrete().sigma(torch.tensor([3, 999])), Discrete().sigma(torch.tensor([3.0, 999.0], dtype=F64))
    )


def test_discrete_between_and_outside_steps() -> None:
    schedule = Discrete()
    at = schedule.sigma(torch.tensor([10.0, 10.5, 11.0], dtype=F64))
    assert float(at[1]) == pytest.approx(math.sqrt(float(at[0] * at[2])), rel=1e-14)
    assert float(schedule.sigma(-5.0)) == float(schedule.sigma(0.0))
    assert float(schedule.sigma(2000.0)) == float(schedule.sigma(999.0))
    assert schedule.time(torch.tensor([0.0, 1e-9, 1e9, INF], dtype=F64)).tolist() == [0.0, 0.0, 999.0, 999.0]
    steps = torch.arange(1000, dtype=F64)
    assert torch.equal(schedule.sigma(steps), schedule.sigmas)
    torch.testing.assert_close(schedule.time(schedule.sigmas), steps, rtol=0, atol=1e-10)


@pytest.mark.parametrize("steps", [2, 7, 1000])
def test_discrete_edges(steps: int) -> None:
    schedule = Discrete(steps=steps)
    for k in {1, steps // 2, steps - 1}:
        edge = schedule.edge_sigma(k)
        assert edge == pytest.approx(
            math.sqrt(float(schedule.sigma(k - 1.0)) * float(schedule.sigma(float(k)))), rel=1e-14
        )
        assert schedule.edge_time(edge) == k
        stages = Stages((edge,)).index(schedule.sigma(torch.arange(steps, dtype=F64)))
        assert stages.tolist() == [0] * k + [1] * (steps - k)
    assert schedule.edge_time(INF) == steps


@pytest.mark.parametrize("edge", [0, 1000, -1, 442.5, math.nan, INF])
def test_discrete_edge_must_be_an_inner_integer(edge: float) -> None:
    with pytest.raises(ValueError, match=r"integer in 1\.\.999"):
        Discrete().edge_sigma(edge)


@pytest.mark.parametrize(
    ("cls", "bad", "named"),
    [
        (VP, {"t_min": 1.0}, "t_min"),
        (VP, {"t_min": -0.1}, "t_min"),
        (VP, {"t_max": INF}, "t_max"),
        (VP, {"t_min": math.nan}, "t_min"),
        (VP, {"beta_d": -1.0}, "beta_d"),
        (VP, {"beta_d": math.nan}, "beta_d"),
        (VP, {"beta_d": 0.0, "beta_min": 0.0}, "beta_min"),
        (VE, {"sigma_min": 0.0}, "sigma_min"),
        (VE, {"sigma_min": 60.0}, "sigma_min"),
        (VE, {"sigma_max": INF}, "sigma_max"),
        (EDM, {"t_max": INF}, "t_max"),
        (EDM, {"t_min": -1.0}, "t_min"),
        (RectifiedFlow, {"sigma_max": INF}, "sigma_max"),
        (RectifiedFlow, {"sigma_max": 0.0}, "sigma_max"),
        (RectifiedFlow, {"t_min": 0.9999}, "t_min"),
        (Discrete, {"steps": 1}, "steps"),
        (Discrete, {"beta_end": 1.0}, "beta_end"),
        (Discrete, {"beta_start": 0.5}, "beta_start"),
        (Discrete, {"spacing": "cubic"}, "spacing"),
        (Discrete, {"spacing": "given", "betas": (0.1,), "steps": 2}, "one for each"),
        (Discrete, {"betas": (0.1,)}, "other spacings have none"),
        (Discrete, {"spacing": "given", "betas": (0.1, 1.0), "steps": 2}, "all betas"),
        (Discrete, {"t_min": 999.0}, "t_min"),
        (LogNormal, {"p_std": 0.0}, "p_std"),
        (LogNormal, {"p_std": INF}, "p_std"),
        (LogNormal, {"p_mean": math.nan}, "p_mean"),
        (UniformTime, {"schedule": Discrete()}, "uniform-steps"),
    ],
)
def test_refused_values_are_named(cls: type, bad: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        cls(**bad)


def test_registries_name_every_class_by_its_kind() -> None:
    for kinds, bases in ((SCHEDULES, (NoiseSchedule, VariancePreserving)), (PRIORS, (SigmaPrior,))):
        concrete = {cls for base in bases for cls in base.__subclasses__() if cls not in bases}
        assert concrete == {kinds[kind] for kind in kinds}
        assert all(kinds[kind].kind == kind for kind in kinds)
