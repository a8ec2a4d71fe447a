from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.samplers import make_plan, multistep_orders, singlestep_orders
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.ve import VE
from multistage_diffusion.schedules.vp import VP

PUBLISHED = SamplingConfig(lower_final="published", denoise_last="never")
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
    plan = make_plan(replace(PUBLISHED, solver=solver, spacing=spacing, calls=20), schedule)
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
    widths = {s.kind: make_plan(config, s).initial_noise_std for s in SCHEDULES}
    wide = pytest.approx(math.sqrt(10.0))
    assert widths == {"vp": wide, "discrete": wide, "ve": 3.0, "edm": 3.0, "rectified-flow": 3.0}


def test_log_snr_steps_are_equal_whatever_their_order():
    plan = make_plan(replace(PUBLISHED, calls=20, sigma_min=0.01, sigma_max=100.0), VP())
    lengths = [math.log(step.calls[0] / step.end) for step in plan.steps]
    assert lengths == pytest.approx([math.log(1e4) / 7] * 7, rel=1e-12)
    inner = [math.log(a / b) for a, b in pairwise((*plan.steps[0].calls, plan.steps[0].end))]
    assert inner == pytest.approx([math.log(1e4) / 21] * 3, rel=1e-12)


def test_calls_of_time_and_edm_spacing_are_one_even_grid():
    vp = VP()
    plan = make_plan(replace(PUBLISHED, calls=21, spacing="time", sigma_min=float(vp.sigma(0.05))), vp)
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
        ({"solver": "heun", "calls": 2}, ["sampling.calls=2", "heun", "at least 3"]),
        ({"sigma_min": 2.0, "sigma_max": 2.0}, ["sampling.sigma_min=2", "sampling.sigma_max=2"]),
        ({"sigma_min": 200.0}, ["sampling.sigma_min=200", "sampling.sigma_max=152"]),
        ({"sigma_min": 0.0}, ["sampling.sigma_min=0"]),
        ({"sigma_max": math.inf}, ["sampling.sigma_max=inf", "finite"]),
        ({"sigma_max": math.nan}, ["sampling.sigma_max=nan"]),
        ({"solver": "euler"}, ["sampling.solver='euler'", "ddim, ddpm, ddpm-large, dpm, dpm++, heun"]),
        ({"order": 4}, ["sampling.order=4", "1, 2, 3", "'dpm'"]),
        ({"method": "twostep"}, ["sampling.method='twostep'", "'multistep'"]),
        ({"spacing": "cosine"}, ["sampling.spacing='cosine'", "log-snr"]),
        ({"churn": 5.0}, ["sampling.churn=5.0", "'dpm'", "'heun'"]),
        ({"solver": "heun", "eta": 0.5}, ["sampling.eta=0.5", "'heun'", "'ddim'"]),
        ({"rho": 0.0}, ["sampling.rho=0.0", "positive"]),
        ({"lower_final": "never"}, ["sampling.lower_final='never'", "'published'"]),
        ({"denoise_last": "on"}, ["sampling.denoise_last='on'", "'auto'"]),
        (
            {"calls": 3, "denoise_last": "always"},
            ["sampling.calls=3", "sampling.denoise_last='always'", "raise it to 4"],
        ),
        ({"solver": "ddim", "calls": 1, "denoise_last": "always"}, ["sampling.calls=1", "raise it to 2"]),
    ],
)
def test_refusals_name_field_and_value(changes, words):
    with pytest.raises(ValueError) as error:
        make_plan(SamplingConfig(**changes), VP())
    assert all(word in str(error.value) for word in words), error.value
    assert "\n" not in str(error.value)


def test_one_call_of_order_one_is_allowed_and_few_calls_of_ddim():
    assert len(make_plan(SamplingConfig(order=1, calls=1), VP()).calls) == 1
    assert [step.order for step in make_plan(SamplingConfig(solver="ddim", calls=2), VP()).steps] == [1, 1]
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


# --- lower_final = "always" -------------------------------------------------------------------------------------------


def lengths(plan):
    return [math.log(step.calls[0] / step.end) for step in plan.steps]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.kind)
@pytest.mark.parametrize("spacing", ["log-snr", "time", "edm"])
@pytest.mark.parametrize("solver", ["dpm", "dpm++"])
@pytest.mark.parametrize("method", ["singlestep", "multistep"])
@pytest.mark.parametrize("calls", [5, 6, 13, 20, 50])
def test_lowered_orders(schedule, spacing, solver, method, calls):
    config = SamplingConfig(solver=solver, method=method, spacing=spacing, calls=calls, denoise_last="never")
    plan = make_plan(config, schedule)
    assert len(plan.calls) == calls
    assert all(a > b for a, b in pairwise((*plan.calls, plan.steps[-1].end)))
    assert all(a.end == b.calls[0] for a, b in pairwise(plan.steps))
    orders = [step.order for step in plan.steps]
    assert orders[-1] == 1
    if method == "multistep":
        assert all(order <= min(3, i + 1, calls - i) for i, order in enumerate(orders))
    else:
        assert all(step.order == len(step.calls) for step in plan.steps)
    longest = {("dpm", "singlestep"): {2: 1.5, 3: 2.0}, ("dpm++", "multistep"): {3: 1.0}}.get((solver, method), {})
    assert all(h <= longest.get(o, math.inf) for h, o in zip(lengths(plan), orders, strict=True))


def test_steps_that_are_short_enough_have_the_order_asked_for():
    config = SamplingConfig(calls=50, sigma_min=0.01, sigma_max=100.0, denoise_last="never")
    assert [s.order for s in make_plan(config, VP()).steps] == [3] * 16 + [1] * 2
    multistep = replace(config, solver="dpm++", method="multistep", calls=12)
    assert [s.order for s in make_plan(multistep, VP()).steps] == [1, 2] + [3] * 8 + [2, 1]
    # 1.15 in ln sigma: too long for order 3
    assert [s.order for s in make_plan(replace(multistep, calls=8), VP()).steps] == [1] + [2] * 6 + [1]


def test_heun_is_edms_where_steps_are_short_enough():
    for calls in (35, 36, 79):
        mine = make_plan(SamplingConfig(solver="heun", calls=calls, spacing="edm"), EDM())
        assert mine == make_plan(replace(PUBLISHED, solver="heun", calls=calls, spacing="edm"), EDM())


@pytest.mark.parametrize("calls", [5, 10, 20, 21])
def test_heun_does_not_correct_long_steps(calls):
    plan = make_plan(
        SamplingConfig(solver="heun", calls=calls, spacing="time"), EDM()
    )  # the last step is e^8 or longer
    assert calls - 1 <= len(plan.calls) <= calls
    for step in plan.steps:
        assert step.order == len(step.calls)
        assert step.order == 1 or math.log(step.calls[0] / step.end) <= 1.5
    assert [s.order for s in plan.steps[-2:]] == [1, 1]


# --- denoise_last -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["dpm", "dpm++", "ddim"])
@pytest.mark.parametrize("method", ["singlestep", "multistep"])
def test_the_last_call_is_one_of_the_calls(solver, method):
    config = SamplingConfig(solver=solver, method=method, calls=20, denoise_last="always")
    plan = make_plan(config, EDM())
    assert len(plan.calls) == 20
    assert (plan.calls[-1], plan.steps[-1].end, plan.steps[-1].order) == (0.002, 0.0, 1)
    before = make_plan(replace(config, calls=19, denoise_last="never"), EDM())
    assert plan.steps[:-1] == before.steps


def test_the_last_call_is_made_where_noise_is_visible():
    ends = {s.kind: make_plan(SamplingConfig(), s).steps[-1].end for s in SCHEDULES}
    assert {kind for kind, end in ends.items() if end == 0} == {"ve", "discrete"}  # 1.3 and 4.9 grey levels
    for grey, end in ((0.99, 0.99 / 127.5), (1.01, 0.0)):
        assert make_plan(SamplingConfig(sigma_min=grey / 127.5), EDM()).steps[-1].end == end
    assert make_plan(SamplingConfig(calls=3), Discrete()).steps[-1].end > 0  # calls for the solver come first
    assert make_plan(SamplingConfig(solver="ddim", calls=1), Discrete()).steps[-1].end > 0
    assert make_plan(replace(PUBLISHED), Discrete()).steps[-1].end > 0


def test_heun_ends_at_0_anyway():
    for choice in ("auto", "always", "never"):
        config = SamplingConfig(solver="heun", spacing="edm", calls=35, denoise_last=choice)
        assert make_plan(config, Discrete()) == make_plan(replace(config, denoise_last="never"), Discrete())
