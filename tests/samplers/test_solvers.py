from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.samplers import make_plan, sample, start_noise, step_noise
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.vp import VP

GOLDEN = Path(__file__).parents[1] / "golden" / "samplers.safetensors"
DPM = [
    {"solver": solver, "method": method, "order": order}
    for solver in ("dpm", "dpm++")
    for method in ("singlestep", "multistep")
    for order in (1, 2, 3)
]
ALL = [*DPM, {"solver": "ddim"}, {"solver": "ddim", "eta": 1.0}, {"solver": "heun"}, {"solver": "heun", "churn": 10.0}]
SPACINGS = ("log-snr", "time", "edm")
PUBLISHED = SamplingConfig(lower_final="published", denoise_last="never")


def label(value: object) -> str:
    return "-".join(str(v) for v in value.values()) if isinstance(value, dict) else str(value)


class Mixture:
    """E[y | y + sigma n] for density sum_j w_j N(mu_j, sd_j² I), recording the sigma of every call."""

    def __init__(self, weights: Tensor, means: Tensor, stds: Tensor) -> None:
        self.weights, self.means, self.stds = weights, means, stds
        self.called: list[float] = []

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        assert type(sigma) is float
        assert not torch.is_grad_enabled()
        self.called.append(sigma)
        x64, variance = x.double(), self.stds**2 + sigma**2
        offset = x64[:, None] - self.means
        logits = self.weights.log() - 0.5 * x.shape[1] * variance.log() - 0.5 * (offset**2).sum(-1) / variance
        posterior = self.means + (self.stds**2 / variance)[:, None] * offset
        return (torch.softmax(logits, 1)[..., None] * posterior).sum(1).to(x.dtype)


@pytest.fixture(scope="module")
def golden() -> tuple[dict, dict[str, Tensor]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def build_mixture(tensors: dict[str, Tensor]) -> Mixture:
    return Mixture(*(tensors[f"mixture.{name}"] for name in ("weights", "means", "stds")))


@pytest.fixture
def mixture(golden) -> Mixture:
    return build_mixture(golden[1])


def relative(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).abs().max() / reference.abs().max())


# --- golden trajectories ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        ("dpm_solver_singlestep3_logsnr_20", "dpm"),
        ("dpm_solver_singlestep3_logsnr_10", "dpm"),
        ("dpm_solver_singlestep2_time_20", "dpm"),
        ("dpm_solverpp_multistep2_time_20", "dpm++"),
        ("ddim_time_20", "dpm"),
        ("ddim_time_20", "dpm++"),
        ("ddim_time_20", "ddim"),
    ],
)
def test_vp_trajectories_equal_the_published_solver(golden, mixture, name, solver):
    config, tensors = golden[0][name], golden[1]
    vp = VP()
    plan = make_plan(
        replace(
            PUBLISHED,
            solver=solver,
            method=config["method"],
            order=config["order"],
            calls=config["steps"],
            spacing={"logSNR": "log-snr", "time_uniform": "time"}[config["spacing"]],
            sigma_min=None if config["t_end"] == 1e-4 else float(vp.sigma(config["t_end"])),
        ),
        vp,
    )
    end = sample(mixture, tensors["noise"] * plan.initial_noise_std, plan)
    assert relative(end * vp.scale(plan.steps[-1].end), tensors[name]) < 1e-9
    assert len(mixture.called) == config["nfe"]
    assert relative(vp.time(torch.tensor(mixture.called, dtype=torch.float64)), tensors[f"{name}.evaluated_t"]) < 1e-9


@pytest.mark.parametrize("extra", [0, 1])  # `calls` is a ceiling: 36 allow no more than 35
def test_heun_trajectory_equals_the_published_sampler(golden, mixture, extra):
    config, tensors = golden[0]["edm_heun_18"], golden[1]
    plan = make_plan(
        replace(PUBLISHED, solver="heun", calls=config["nfe"] + extra, spacing="edm", rho=config["rho"]),
        EDM(t_min=config["sigma_min"], t_max=config["sigma_max"]),
    )
    assert plan.initial_noise_std == config["sigma_max"]
    end = sample(mixture, tensors["noise"] * plan.initial_noise_std, plan)
    assert relative(end, tensors["edm_heun_18"]) < 1e-9
    assert len(mixture.called) == config["nfe"]


# --- order of convergence ---------------------------------------------------------------------------------------------

LOW, HIGH = 0.05, 60.0


@pytest.fixture(scope="module")
def reference(golden) -> tuple[Tensor, Tensor]:
    """Start and end of the probability-flow ODE, by Runge-Kutta 4 in ln sigma, a route of its own."""
    denoiser = build_mixture(golden[1])
    start = x = golden[1]["noise"] * HIGH

    def slope(x: Tensor, u: float) -> Tensor:
        return x - denoiser(x, math.exp(u))

    grid = torch.linspace(math.log(HIGH), math.log(LOW), 501, dtype=torch.float64).tolist()
    with torch.no_grad():
        for u, v in pairwise(grid):
            d = v - u
            k1 = slope(x, u)
            k2 = slope(x + 0.5 * d * k1, u + 0.5 * d)
            k3 = slope(x + 0.5 * d * k2, u + 0.5 * d)
            k4 = slope(x + d * k3, v)
            x = x + d / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
    return start, x


@pytest.mark.parametrize(
    ("case", "spacing"),
    [
        *((case, "log-snr") for case in (*DPM, {"solver": "ddim"})),
        *((case, "edm") for case in DPM if case["order"] > 1),  # steps of unequal length
        *((case, "time") for case in DPM if case["order"] == 3 and case["method"] == "singlestep"),  # r2 far from 2/3
    ],
    ids=label,
)
def test_error_falls_with_the_order(mixture, reference, case, spacing):
    """Twice the steps, 2^order times less error: inner points and past steps are weighted as the theory says."""
    start, end = reference
    order = case.get("order", 1)
    errors = []
    for steps in (64, 128):
        # 3K - 1 calls end on a step of order 2, whose local error is of the size that order 3 has globally
        calls = order * steps - (order == 3) if case.get("method") == "singlestep" else steps
        config = replace(PUBLISHED, **case, calls=calls, spacing=spacing, sigma_min=LOW, sigma_max=HIGH)
        errors.append(float((sample(mixture, start, make_plan(config, VP())) - end).abs().max()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.45)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("case", [c for c in DPM if c["order"] == 3], ids=label)
def test_order_three_is_exact_for_predictions_linear_in_lambda(case, spacing):
    """With f = lambda the update is a closed integral, whatever r1 and r2 are."""
    data = case["solver"] == "dpm++"
    states: list[tuple[float, Tensor]] = []

    def denoiser(x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        states.append((sigma, x))
        f = -math.log(sigma)
        return torch.full_like(x, f) if data else x - sigma * f

    def exact(x: Tensor, s: float, t: float) -> Tensor:
        if data:
            h = math.log(s / t)
            return t / s * x - math.log(s) * (1 - t / s) + (h - 1 + t / s)
        return x - (t * math.log(t) - t) + (s * math.log(s) - s)

    plan = make_plan(replace(PUBLISHED, **case, calls=13, spacing=spacing, sigma_min=0.05), VP())
    sample(denoiser, torch.tensor([[3.0], [-5.0]], dtype=torch.float64), plan)
    # from the start of a step to its second inner point and its end; multistep: once two steps are past
    pairs = [(0, 2), (0, 3), (3, 5), (9, 12)] if case["method"] == "singlestep" else [(2, 3), (6, 7), (11, 12)]
    for i, j in pairs:
        (s, x), (t, arrived) = states[i], states[j]
        torch.testing.assert_close(arrived, exact(x, s, t), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("third_order", ["exact", "published"])
@pytest.mark.parametrize("solver", ["dpm", "dpm++"])
def test_multistep_order_three_halves_the_second_derivative_as_published(solver: str, third_order: str) -> None:
    """With f = lambda² a step integrates a parabola: the whole one, or the one with half the second derivative."""
    data, states = solver == "dpm++", list[tuple[float, Tensor]]()

    def denoiser(x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        states.append((sigma, x))
        f = math.log(sigma) ** 2
        return torch.full_like(x, f) if data else x - sigma * f

    case = {"solver": solver, "method": "multistep", "order": 3, "third_order": third_order}
    plan = make_plan(replace(PUBLISHED, **case, calls=13, spacing="time", sigma_min=0.05), VP())
    sample(denoiser, torch.tensor([[3.0], [-5.0]], dtype=torch.float64), plan)
    points, weights = np.polynomial.legendre.leggauss(24)
    for i in (2, 6, 11):
        (s, x), (t, arrived) = states[i], states[i + 1]
        start, end = -math.log(s), -math.log(t)
        expected = math.exp(start - end) * x if data else x
        for point, weight in zip(points, weights, strict=True):
            d = 0.5 * (end - start) * (point + 1)
            f = start**2 + 2 * start * d + (d**2 if third_order == "exact" else d**2 / 2)
            kernel = math.exp(start + d - end) if data else -math.exp(-start - d)
            expected = expected + 0.5 * (end - start) * weight * kernel * f
        torch.testing.assert_close(arrived, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("spacing", ["log-snr", "edm"])
def test_heun_is_of_order_two(mixture, spacing):
    """To sigma = 0, against the same sampler refined: the last Euler step starts where D hardly changes."""
    start = torch.tensor([[30.0, 20.0], [-50.0, 10.0]], dtype=torch.float64)

    def run(n: int) -> Tensor:
        config = SamplingConfig(solver="heun", calls=2 * n - 1, spacing=spacing, sigma_min=1e-3, sigma_max=HIGH)
        return sample(mixture, start, make_plan(config, VP()))

    coarse, middle, fine = run(60), run(119), run(237)
    ratio = (coarse - middle).abs().max() / (middle - fine).abs().max()
    assert math.log2(ratio) == pytest.approx(2.0, abs=0.3)


# --- lower_final = "always" -------------------------------------------------------------------------------------------


def integral(nodes: list[float], values: list[Tensor], start: float, end: float, data: bool) -> Tensor:
    """Integrate the exponentially weighted polynomial through (lambda, prediction) of a step, by Gauss-Legendre quadrature.

    dx/dlambda = -x + D with data prediction, d(x)/dlambda = -e^-lambda f with noise prediction.
    """
    points, weights = np.polynomial.legendre.leggauss(24)
    total = torch.zeros_like(values[0])
    for point, weight in zip(points, weights, strict=True):
        u = 0.5 * (end - start) * point + 0.5 * (end + start)
        basis = [
            math.prod((u - other) / (node - other) for j, other in enumerate(nodes) if j != i)
            for i, node in enumerate(nodes)
        ]
        value = sum((b * v for b, v in zip(basis, values, strict=True)), torch.zeros_like(values[0]))
        kernel = math.exp(u - end) if data else -math.exp(-u)
        total = total + 0.5 * (end - start) * weight * kernel * value
    return total


def arrive(x: Tensor, nodes: list[float], values: list[Tensor], end: float, order: int, data: bool) -> Tensor:
    """Follow one step of order 1 to 3 from lambda nodes[0] to `end`; order 2 with the papers' phi_1 / 2 for phi_2."""
    start = nodes[0]
    decayed = math.exp(start - end) * x if data else x
    if order != 2:
        return decayed + integral(nodes[:order], values[:order], start, end, data)
    slope = (values[0] - values[1]) / (nodes[0] - nodes[1])
    return decayed + integral(nodes[:1], [values[0] + 0.5 * (end - start) * slope], start, end, data)


@pytest.mark.parametrize("calls", [5, 6, 9, 10, 20])
@pytest.mark.parametrize("spacing", ["log-snr", "time"])
@pytest.mark.parametrize("case", [c for c in DPM if c["order"] > 1], ids=label)
def test_lowered_trajectories_equal_step_by_step_integration(golden, mixture, case, spacing, calls):
    """Every step is an integral of a polynomial through the denoiser's answers, done by quadrature here."""
    vp, data = VP(), case["solver"] == "dpm++"
    plan = make_plan(SamplingConfig(**case, calls=calls, spacing=spacing, denoise_last="never"), vp)
    start = golden[1]["noise"] * plan.initial_noise_std
    end = sample(mixture, start, plan)
    low, high = float(vp.sigma(1e-4)), float(vp.sigma(1.0))
    if spacing == "time":
        grid = [float(vp.sigma(1.0 + (1e-4 - 1.0) * i / calls)) for i in range(calls + 1)]
    else:
        grid = [high * (low / high) ** (i / calls) for i in range(calls + 1)]
    lam = [-math.log(sigma) for sigma in grid]

    def predict(x: Tensor, sigma: float) -> Tensor:
        denoised = mixture(x, sigma)
        return denoised if data else (x - denoised) / sigma

    x, i, past = start, 0, list[tuple[float, Tensor]]()
    with torch.no_grad():
        while case["method"] == "multistep" and i < calls:
            past.insert(0, (lam[i], predict(x, grid[i])))
            order = min(case["order"], i + 1, calls - i)
            if data and lam[i + 1] - lam[i] > 1.0:
                order = min(order, 2)
            x = arrive(x, [p[0] for p in past], [p[1] for p in past], lam[i + 1], order, data)
            i += 1
        while case["method"] == "singlestep" and i < calls:
            fits = [
                o
                for o in range(1, case["order"] + 1)
                if o == 1 or (o < calls - i and (data or lam[i + o] - lam[i] <= {2: 1.5, 3: 2.0}[o]))
            ]
            order = max(fits)
            nodes, values = [lam[i]], [predict(x, grid[i])]
            to = lam[i + order]
            if order > 1:
                x1 = arrive(x, nodes, values, lam[i + 1], 1, data)
                nodes.append(lam[i + 1])
                values.append(predict(x1, grid[i + 1]))
            if (
                order == 3
            ):  # the second inner point by the line through two answers, the step by one through the outer two
                x2 = decayed_line(x, nodes, values, lam[i + 2], data)
                nodes[1], values[1] = lam[i + 2], predict(x2, grid[i + 2])
                x = decayed_line(x, nodes, values, to, data)
            else:
                x = arrive(x, nodes, values, to, order, data)
            i += order
    assert relative(end, x) < 1e-9


def decayed_line(x: Tensor, nodes: list[float], values: list[Tensor], end: float, data: bool) -> Tensor:
    """Follow a step with the exact integral of the line through two answers (Lu et al. 2022a, algorithm 2)."""
    decayed = math.exp(nodes[0] - end) * x if data else x
    return decayed + integral(nodes, values, nodes[0], end, data)


@pytest.mark.parametrize("calls", [9, 10, 20])
def test_time_spacing_is_not_worse_than_ddim_at_any_number_of_calls(golden, mixture, calls):
    """The published order at the end, lowered below 10 calls only, makes 10 calls worse than 9."""
    fine = SamplingConfig(solver="dpm++", method="multistep", calls=800, denoise_last="never")
    start = golden[1]["noise"] * make_plan(fine, VP()).initial_noise_std
    exact = sample(mixture, start, make_plan(fine, VP()))

    def error(**changes: Any) -> float:
        end = sample(mixture, start, make_plan(replace(fine, spacing="time", **changes), VP()))
        return float((end - exact).square().mean().sqrt())

    ddim = error(calls=calls, solver="ddim")
    assert error(calls=calls) < 1.1 * ddim
    if calls >= 10:
        assert error(calls=calls, lower_final="published") > 5 * ddim


@pytest.mark.parametrize("case", [*(c for c in DPM if c["order"] > 1), {"solver": "heun"}], ids=label)
def test_lowered_orders_converge(mixture, reference, case):
    """The last step, of order 1, leaves the square of its length: order 2 in all, at least."""
    start, end = reference
    if case["solver"] == "heun":  # it goes on to 0
        fine = SamplingConfig(solver="heun", calls=1001, sigma_min=LOW, sigma_max=HIGH)
        end = sample(mixture, start, make_plan(fine, VP()))
    low = [
        float((sample(mixture, start, make_plan(config, VP())) - end).abs().max())
        for calls in (96, 192)
        for config in [SamplingConfig(**case, calls=calls, sigma_min=LOW, sigma_max=HIGH, denoise_last="never")]
    ]
    assert math.log2(low[0] / low[1]) > 1.5


@pytest.mark.parametrize("case", [*DPM, {"solver": "ddim"}, {"solver": "ddim", "eta": 1.0}], ids=label)
def test_the_last_call_s_answer_is_the_result(golden, mixture, case):
    config = SamplingConfig(**case, calls=13, sigma_min=0.04, denoise_last="always")
    plan, noise = make_plan(config, VP()), step_noise(0, torch.arange(16), (2,), torch.float64)
    start = golden[1]["noise"] * plan.initial_noise_std
    before = sample(mixture, start, make_plan(replace(config, calls=12, denoise_last="never"), VP()), noise=noise)
    with torch.no_grad():
        expected = mixture(before, 0.04)
    mixture.called.clear()
    seen: list[tuple[int, int]] = []
    end = sample(mixture, start, plan, noise=noise, progress=lambda *done: seen.append(done))
    torch.testing.assert_close(end, expected, rtol=0, atol=1e-13)
    assert len(mixture.called) == 13
    assert seen[-1] == (13, 13)


# --- stochastic solvers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_is_the_papers_equation_in_scaled_coordinates(golden, mixture, eta):
    """Song et al. 2021, eq. (12) and (16), in their alpha = 1/(1 + sigma²) and their x = sqrt(alpha) (y + sigma n)."""
    vp, noise = VP(), step_noise(5, torch.arange(16), (2,), torch.float64)
    plan = make_plan(SamplingConfig(solver="ddim", calls=12, eta=eta), vp)
    x = golden[1]["noise"]
    end = sample(mixture, x * plan.initial_noise_std, plan, noise=noise)
    with torch.no_grad():
        for i, step in enumerate(plan.steps):
            a, a_prev = 1 / (1 + step.calls[0] ** 2), 1 / (1 + step.end**2)
            x0 = mixture(x / math.sqrt(a), step.calls[0])
            eps = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
            std = eta * math.sqrt((1 - a_prev) / (1 - a)) * math.sqrt(1 - a / a_prev)
            x = math.sqrt(a_prev) * x0 + math.sqrt(1 - a_prev - std**2) * eps + std * noise(i)
    assert relative(end * vp.scale(plan.steps[-1].end), x) < 1e-9


@pytest.mark.parametrize("churn", [3.0, 40.0])
def test_heun_with_churn_is_edms_algorithm_2(golden, mixture, churn):
    """Karras et al. 2022, Algorithm 2, line by line with the sigmas of eq. (5)."""
    n, noise = 10, step_noise(5, torch.arange(16), (2,), torch.float64)
    plan = make_plan(replace(PUBLISHED, solver="heun", calls=2 * n - 1, churn=churn, spacing="edm"), EDM())
    x = golden[1]["noise"] * 80.0
    end = sample(mixture, x, plan, noise=noise)
    t = [(80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)] + [0.0]

    def slope(x: Tensor, t: float) -> Tensor:
        return (x - mixture(x, t)) / t

    with torch.no_grad():
        for i in range(n):
            gamma = min(churn / n, math.sqrt(2) - 1)
            t_hat = t[i] + gamma * t[i]
            x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * noise(i)
            d = slope(x_hat, t_hat)
            x = x_hat + (t[i + 1] - t_hat) * d
            if t[i + 1] != 0:
                x = x_hat + (t[i + 1] - t_hat) * (0.5 * d + 0.5 * slope(x, t[i + 1]))
    assert relative(end, x) < 1e-9


@pytest.mark.parametrize("case", [{"solver": "ddim", "eta": 0.5}, {"solver": "heun", "churn": 10.0}], ids=label)
def test_stochastic_plans_ask_for_noise(golden, mixture, case):
    plan = make_plan(SamplingConfig(**case), EDM())
    with pytest.raises(ValueError, match="noise=None"):
        sample(mixture, golden[1]["noise"], plan)


# --- every solver -----------------------------------------------------------------------------------------------------


class Points:
    """The optimal denoiser of a finite data set."""

    def __init__(self, points: Tensor) -> None:
        self.points = points

    def __call__(self, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        distance = torch.cdist(x, self.points, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.softmax(-0.5 * (distance / sigma) ** 2, 1) @ self.points


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("case", ALL, ids=label)
def test_fifty_calls_land_on_data(case, spacing):
    # far apart beside the last step of the time grid (from 0.08, or 0.14), which cannot settle near ones
    chosen = torch.randperm(5**4, generator=torch.Generator().manual_seed(0))[:50]
    points = 4.0 * (torch.cartesian_prod(*[torch.arange(5.0, dtype=torch.float64)] * 4)[chosen] - 2.0)
    # sigma is left in the result: at 0.002, five standard deviations are 1e-2
    schedule = VP() if spacing == "time" else EDM()
    plan = make_plan(SamplingConfig(**case, calls=50, spacing=spacing, sigma_min=0.002), schedule)
    indices = torch.arange(64)
    end = sample(
        Points(points),
        start_noise(1, indices, (4,), plan, torch.float64),
        plan,
        noise=step_noise(1, indices, (4,), torch.float64),
    )
    distance = (end[:, None] - points).abs().amax(2)
    assert float(distance.amin(1).max()) < 1e-2
    assert len(distance.argmin(1).unique()) > 20  # on many points, not on one


@pytest.mark.parametrize("case", ALL, ids=label)
def test_calls_progress_and_float32(golden, mixture, case):
    plan = make_plan(SamplingConfig(**case, calls=13), VP())
    start = golden[1]["noise"] * plan.initial_noise_std
    noise, seen = step_noise(0, torch.arange(16), (2,), torch.float64), []
    end = sample(mixture, start, plan, noise=noise, progress=lambda made, total: seen.append((made, total)))
    assert mixture.called == list(plan.calls)
    assert seen == [(i + 1, 13) for i in range(13)]
    assert end.dtype == torch.float64
    single = sample(mixture, start.float(), plan, noise=noise)
    assert single.dtype == torch.float32
    assert relative(single.double(), end) < 1e-4
    assert sample(mixture, start.bfloat16(), plan, noise=noise).dtype == torch.float32


def test_conditioning_reaches_every_call():
    cond, seen = Conditioning(labels=torch.tensor([1, 2])), []

    def denoiser(x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        seen.append(cond)
        return torch.zeros_like(x)

    sample(denoiser, torch.ones(2, 3), make_plan(SamplingConfig(calls=5), VP()), cond)
    assert len(seen) == 5
    assert all(c is cond for c in seen)


def test_non_finite_samples_are_counted():
    def denoiser(x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        return torch.where(x[:, :1] > 0, x, math.nan)

    plan = make_plan(SamplingConfig(order=1, calls=2), EDM())
    with pytest.raises(FloatingPointError, match=r"1 of 3 samples are not finite .* sigma=0\.002"):
        sample(denoiser, torch.tensor([[1.0, 1.0], [-1.0, 1.0], [2.0, 0.0]]), plan)


# --- noise of a sample ------------------------------------------------------------------------------------------------


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    plan = make_plan(SamplingConfig(solver="ddim", eta=1.0), VP())
    everyone = start_noise(7, torch.arange(100), (3, 4, 5), plan)
    some = torch.tensor([42, 3, 99])
    assert torch.equal(start_noise(7, some, (3, 4, 5), plan), everyone[some])
    assert torch.equal(step_noise(7, some, (6,))(2), step_noise(7, torch.arange(100), (6,))(2)[some])
    assert not torch.equal(start_noise(8, some, (3, 4, 5), plan), everyone[some])
    assert not torch.equal(step_noise(7, some, (6,))(2), step_noise(7, some, (6,))(3))


def test_start_noise_has_the_plans_width():
    plan = make_plan(SamplingConfig(), VP())
    noise = start_noise(0, torch.arange(1000), (50,), plan, torch.float64)
    assert float(noise.std() / plan.initial_noise_std) == pytest.approx(1.0, abs=0.02)
    assert float(noise.mean() / plan.initial_noise_std) == pytest.approx(0.0, abs=0.02)
    assert not torch.equal(noise, plan.initial_noise_std * step_noise(0, torch.arange(1000), (50,), torch.float64)(0))


def test_stochastic_samples_do_not_depend_on_their_batch(mixture):
    plan = make_plan(SamplingConfig(solver="heun", calls=9, churn=5.0), VP())

    def run(indices: Tensor) -> Tensor:
        start = start_noise(3, indices, (2,), plan, torch.float64)
        return sample(mixture, start, plan, noise=step_noise(3, indices, (2,), torch.float64))

    torch.testing.assert_close(run(torch.tensor([5, 2])), run(torch.arange(8))[[5, 2]], rtol=1e-12, atol=1e-12)
