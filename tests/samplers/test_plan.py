from __future__ import annotations

import math
from itertools import pairwise

import pytest

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.samplers import make_plan, multistep_orders, singlestep_orders
from multistage_diffusion.schedules import EDM, VE, VP, Discrete, RectifiedFlow

SCHEDULES = [VP(), VE(), EDM(), RectifiedFlow(), Discrete()]


@pytest.mark.parametrize(
    ("calls", "order", "orders"),
    [
        (20, 3, [3] * 6 + [2]),
        (19, 3, [3] * 6 + [1]),
        (21, 3, [3] * 6 + [2, 1]),
        (3, 3, [2, 1]),
        (4, 3, [3, 1]),
        (6, 2, [2, 2, 2]),
        (7, 2, [2, 2, 2, 1]),
        (4, 1, [1] * 4),
    ],
)
def test_singlestep_orders(calls, order, orders):
    assert singlestep_orders(calls, order) == orders


@pytest.mark.parametrize(
    ("calls", "order", "orders"),
    [
        (10, 2, [1] + [2] * 9),
        (10, 3, [1, 2] + [3] * 8),
        (9, 2, [1] + [2] * 7 + [1]),
        (9, 3, [1, 2] + [3] * 5 + [2, 1]),
        (3, 3, [1, 2, 1]),
        (12, 1, [1] * 12),
    ],
)
def test_multistep_orders(calls, order, orders):
    assert multistep_orders(calls, order) == orders


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
@pytest.mark.parametrize("spacing", ["log-snr", "time", "edm"])
@pytest.mark.parametrize("solver", ["dpm", "ddim", "heun"])
def test_every_plan_descends_in_the_calls_it_was_given(schedule, spacing, solver):
    plan = make_plan(SamplingConfig(solver=solver, spacing=spacing, calls=20), schedule)
    assert len(plan.calls) == (19 if solver == "heun" else 20)
    assert not plan.stochastic
    for step in plan.steps:
        assert all(a > b for a, b in pairwise((*step.calls[: 1 if solver == "heun" else None], step.end)))
    assert all(a.end == b.calls[0] for a, b in pairwise(plan.steps))
    assert plan.calls[0] == float(schedule.sigma(schedule.t_max))
    last = plan.steps[-2] if solver == "heun" else plan.steps[-1]
    assert last.end == float(schedule.sigma(1e-4 if schedule.kind == "vp" else schedule.t_min))


def test_starting_width_is_the_schedules():
    config = SamplingConfig(sigma_max=3.0)
    widths = {s.kind: make_plan(config, s).start_std for s in SCHEDULES}
    wide = pytest.approx(math.sqrt(10.0))
    assert widths == {"vp": wide, "discrete": wide, "ve": 3.0, "edm": 3.0, "rectified-flow": 3.0}


def test_log_snr_steps_are_equal_whatever_their_order():
    plan = make_plan(SamplingConfig(calls=20, sigma_min=0.01, sigma_max=100.0), VP())
    lengths = [math.log(step.calls[0] / step.end) for step in plan.steps]
    assert lengths == pytest.approx([math.log(1e4) / 7] * 7, rel=1e-12)
    inner = [math.log(a / b) for a, b in pairwise((*plan.steps[0].calls, plan.steps[0].end))]
    assert inner == pytest.approx([math.log(1e4) / 21] * 3, rel=1e-12)


def test_calls_of_time_and_edm_spacing_are_one_even_grid():
    vp = VP()
    plan = make_plan(SamplingConfig(calls=21, spacing="time", sigma_min=float(vp.sigma(0.05))), vp)
    times = [float(vp.time(sigma)) for sigma in plan.calls]
    assert times == pytest.approx([1 - 0.95 * i / 21 for i in range(21)], rel=1e-12)
    plan = make_plan(SamplingConfig(calls=20, spacing="edm", rho=5.0), EDM())
    roots = [80**0.2 + (0.002**0.2 - 80**0.2) * i / 20 for i in range(20)]
    assert [sigma**0.2 for sigma in plan.calls] == pytest.approx(roots, rel=1e-12)


def test_churn_lifts_sigma_by_no_more_than_root_two():
    def lift(churn: float) -> float:
        config = SamplingConfig(solver="heun", calls=19, churn=churn)
        plan, still = make_plan(config, EDM()), make_plan(SamplingConfig(solver="heun", calls=19), EDM())
        ratios = {round(a.calls[0] / b.calls[0], 12) for a, b in zip(plan.steps, still.steps, strict=True)}
        for a, b in zip(plan.steps, still.steps, strict=True):
            assert a.noise_std**2 + b.calls[0] ** 2 == pytest.approx(a.calls[0] ** 2)
        assert plan.stochastic
        (ratio,) = ratios
        return ratio

    assert lift(2.0) == pytest.approx(1.2)  # 10 sigmas
    assert lift(40.0) == pytest.approx(math.sqrt(2.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calls": 2}, ["sampling.calls=2", "sampling.order=3"]),
        ({"calls": 2, "method": "multistep"}, ["sampling.calls=2", "sampling.order=3"]),
        ({"solver": "heun", "calls": 2}, ["sampling.calls=2", "heun", "3"]),
        ({"sigma_min": 2.0, "sigma_max": 2.0}, ["sampling.sigma_min=2", "sampling.sigma_max=2"]),
        ({"sigma_min": 200.0}, ["sampling.sigma_min=200", "sampling.sigma_max=152"]),
        ({"sigma_min": 0.0}, ["sampling.sigma_min=0"]),
        ({"sigma_max": math.inf}, ["sampling.sigma_max=inf", "finite"]),
        ({"sigma_max": math.nan}, ["sampling.sigma_max=nan"]),
        ({"solver": "euler"}, ["sampling.solver='euler'", "'heun'"]),
        ({"method": "twostep"}, ["sampling.method='twostep'", "'multistep'"]),
        ({"spacing": "cosine"}, ["sampling.spacing='cosine'", "'log-snr'"]),
        ({"churn": 5.0}, ["sampling.churn=5.0", "'dpm'", "'heun'"]),
        ({"solver": "heun", "eta": 0.5}, ["sampling.eta=0.5", "'heun'", "'ddim'"]),
        ({"rho": 0.0}, ["sampling.rho=0.0", "positive"]),
    ],
)
def test_refusals_name_field_and_value(changes, words):
    with pytest.raises(ValueError) as error:
        make_plan(SamplingConfig(**changes), VP())
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_one_call_of_order_one_is_allowed_and_few_calls_of_ddim():
    assert len(make_plan(SamplingConfig(order=1, calls=1), VP()).calls) == 1
    assert len(make_plan(SamplingConfig(solver="ddim", calls=1), VP()).calls) == 1


@pytest.mark.parametrize(
    ("schedule", "changes", "word"),
    [
        (Discrete(), {"sigma_max": 1000.0}, "sampling.sigma_max=1000"),
        (Discrete(), {"sigma_min": 1e-4}, "sampling.sigma_min=0.0001"),
        (RectifiedFlow(sigma_max=50.0), {"sigma_max": 60.0}, "sampling.sigma_max=60"),
    ],
)
def test_time_spacing_refuses_sigmas_without_a_time(schedule, changes, word):
    with pytest.raises(ValueError, match=word):
        make_plan(SamplingConfig(spacing="time", **changes), schedule)
    assert make_plan(SamplingConfig(spacing="log-snr", **changes), schedule).calls
