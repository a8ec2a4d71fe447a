"""Solvers that follow a plan from noise to images: DPM-Solver, DPM-Solver++, DDIM and EDM's Heun.

All states are in unscaled coordinates x = y + sigma n. There every schedule has the same probability-flow ODE,
dx/dsigma = (x - D(x; sigma))/sigma (Karras et al. 2022, eq. 1 and 3), and DPM-Solver's updates are those of the scaled
state divided by s(t). With lambda = -ln sigma and a step of length h in lambda from sigma_s to sigma_t, the two
exponential integrators (Lu et al. 2022a, "DPM-Solver"; 2022b, "DPM-Solver++") are

    noise prediction, f = (x - D)/sigma:   x_t = x_s - sigma_t sum_k h^k phi_k(h) f^(k-1)
    data prediction,  f = D:               x_t = (sigma_t/sigma_s) x_s + sum_k h^k phi_k(-h) f^(k-1)

where phi_1(z) = (e^z - 1)/z, phi_2 = (phi_1 - 1)/z, phi_3 = (phi_2 - 1/2)/z. Solvers differ in how they estimate the
derivatives f^(k) in lambda: from inner points (singlestep) or from earlier steps (multistep). At order 2 both papers
replace phi_2 by phi_1/2, which has the same order of accuracy.

Trajectories end at sigma_min or at 0. Heun always ends at 0. The other solvers end at 0 if the output of a last
denoiser call at sigma_min is the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import rng
from ..contracts import Conditioning, Denoiser, denoise_uniform
from ..errors import NotFiniteError, UserError
from ..progress import Progress
from .plan import Plan, Step

Denoise = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


def start_noise(
    seed: int, indices: Tensor, shape: Sequence[int], plan: Plan, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw the unscaled starting states of samples `indices`.

    Args:
        seed: sampling seed.
        indices: int64 (B,) sample numbers; they set the device.
        shape: shape of one sample, without the batch.
        plan: gives the standard deviation.
        dtype: of the result.

    Returns:
        (B, *shape); the row of sample i depends only on (seed, i) and the plan, not on its batch.
    """
    return rng.normal((seed, "sampling", "start"), indices, shape, torch.float64).mul_(plan.start_std).to(dtype)


def step_noise(seed: int, indices: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Noise:
    """Return a function that draws the unit noise of a step for `sample`, keyed by (seed, step, sample number)."""
    return lambda step: rng.normal((seed, "sampling", "step", step), indices, shape, dtype)


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    start: Tensor,
    plan: Plan,
    cond: Conditioning | None = None,
    *,
    noise: Noise | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Follow a plan from noise to data.

    Args:
        denoiser: any Denoiser; called with sigma in float64, so stage edges are compared exactly.
        start: unscaled starting states (B, ...), e.g. from `start_noise`.
        plan: from `make_plan`.
        cond: labels, passed to every call.
        noise: maps a step index to unit noise of start's shape, e.g. from `step_noise`; needed for churn or eta.
        progress: called after each denoiser call with (calls made, total calls).

    Returns:
        The unscaled states at the end of the plan, shaped like start: float64 if start is float64, else float32.

    Raises:
        UserError: if the plan is stochastic and `noise` is None.
        NotFiniteError: if the result is not finite.
    """
    if plan.stochastic and noise is None:
        raise UserError(f"noise=None: {plan.solver} with churn or eta draws noise in each step; pass step_noise(...)")
    made, total = 0, len(plan.calls)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal made
        denoised = denoise_uniform(denoiser, x, sigma, cond).to(x.dtype)
        made += 1
        if progress is not None:
            progress(made, total)
        return denoised

    x = start if start.dtype == torch.float64 else start.float()
    denoises_last = plan.solver != "heun" and plan.steps[-1].end == 0
    steps = plan.steps[:-1] if denoises_last else plan.steps
    if plan.solver == "heun":
        x = _heun(denoise, x, steps, noise)
    elif plan.solver == "ddim":
        x = _ddim(denoise, x, steps, noise)
    elif plan.method == "multistep":
        x = _multistep(denoise, x, steps, data=plan.solver == "dpm++")
    else:
        x = _singlestep(denoise, x, steps, data=plan.solver == "dpm++")
    if denoises_last:
        x = denoise(x, plan.steps[-1].calls[0])
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        end = plan.steps[-1].end
        raise NotFiniteError(f"{bad} of {len(x)} samples are not finite at the trajectory's end, sigma={end:.6g}")
    return x


@dataclass(frozen=True)
class _Flow:
    """The exact solution over one step: x_t = decay x_s + w1 f + w2 (h f') + w3 (h² f'') + .., derivatives at s."""

    h: float
    decay: float
    w1: float
    w2: float
    w3: float


def _flow(sigma_s: float, sigma_t: float, data: bool) -> _Flow:
    h = math.log(sigma_s / sigma_t)
    z = -h if data else h
    decay, factor = (sigma_t / sigma_s, h) if data else (1.0, -sigma_t * h)
    phi1 = math.expm1(z) / z
    phi2 = (phi1 - 1.0) / z
    phi3 = (phi2 - 0.5) / z
    return _Flow(h, decay, factor * phi1, factor * phi2, factor * phi3)


def _predict(denoise: Denoise, x: Tensor, sigma: float, data: bool) -> Tensor:
    denoised = denoise(x, sigma)
    return denoised if data else (x - denoised) / sigma


def _singlestep(denoise: Denoise, x: Tensor, steps: Sequence[Step], *, data: bool) -> Tensor:
    """Run DPM-Solver-1, -2, -3 (Lu et al. 2022a, algorithms 1 and 2) or 2S, 3S; r1, r2 follow from the inner points.

    Order 3 needs r2 = 2/3 up to O(h). This holds for every smooth spacing, and exactly for log-SNR spacing.
    """
    for step in steps:
        start, *inner = step.calls
        flow = _flow(start, step.end, data)
        f0 = _predict(denoise, x, start, data)
        change = flow.w1 * f0
        if inner:
            to1 = _flow(start, inner[0], data)
            r1 = to1.h / flow.h
            d1 = _predict(denoise, to1.decay * x + to1.w1 * f0, inner[0], data) - f0
            if step.order == 2:
                change = change + (0.5 / r1 * flow.w1) * d1
            else:
                to2 = _flow(start, inner[1], data)
                r2 = to2.h / flow.h
                x2 = to2.decay * x + to2.w1 * f0 + (r2 / r1 * to2.w2) * d1
                d2 = _predict(denoise, x2, inner[1], data) - f0
                change = change + (flow.w2 / r2) * d2
        x = flow.decay * x + change
    return x


def _multistep(denoise: Denoise, x: Tensor, steps: Sequence[Step], *, data: bool) -> Tensor:
    """Run Adams-Bashforth in lambda: derivatives come from earlier predictions (Lu et al. 2022b, Algorithm 2).

    Order 3 estimates f' and f'' by divided differences. f'' is twice the second difference; without the factor 2 the
    order is lost.
    """
    past: list[tuple[float, Tensor]] = []  # (lambda, prediction), newest first
    for step in steps:
        flow = _flow(step.calls[0], step.end, data)
        past = [(-math.log(step.calls[0]), _predict(denoise, x, step.calls[0], data)), *past[:2]]
        (lambda0, f0), older = past[0], past[1 : step.order]
        change = flow.w1 * f0
        if older:
            lambda1, f1 = older[0]
            first = (f0 - f1) / (lambda0 - lambda1)
            if step.order == 2:
                change = change + (0.5 * flow.w1 * flow.h) * first
            else:
                lambda2, f2 = older[1]
                second = (first - (f1 - f2) / (lambda1 - lambda2)) / (lambda0 - lambda2)
                slope = first + (lambda0 - lambda1) * second
                change = change + (flow.w2 * flow.h) * slope + (2.0 * flow.w3 * flow.h**2) * second
        x = flow.decay * x + change
    return x


def _add_noise(x: Tensor, std: float, noise: Noise | None, step: int) -> Tensor:
    if std == 0:
        return x
    assert noise is not None  # `sample` raises for a stochastic plan without noise
    return x + std * noise(step).to(x)


def _ddim(denoise: Denoise, x: Tensor, steps: Sequence[Step], noise: Noise | None) -> Tensor:
    """Run DDIM with eta (Song et al. 2021, eq. 12, divided by sqrt(alpha))."""
    for i, step in enumerate(steps):
        denoised = denoise(x, step.calls[0])
        direction = math.sqrt(step.end**2 - step.noise_std**2) / step.calls[0]
        x = denoised + direction * (x - denoised)
        x = _add_noise(x, step.noise_std, noise, i)
    return x


def _heun(denoise: Denoise, x: Tensor, steps: Sequence[Step], noise: Noise | None) -> Tensor:
    """Run Heun's method in sigma with churn (Karras et al. 2022, algorithms 1 and 2); the last step is an Euler step.

    Steps with one call only are not corrected.
    """
    for i, step in enumerate(steps):
        start, *corrected = step.calls
        x = _add_noise(x, step.noise_std, noise, i)
        slope = (x - denoise(x, start)) / start
        ahead = x + (step.end - start) * slope
        if corrected:
            slope = 0.5 * (slope + (ahead - denoise(ahead, step.end)) / step.end)
            ahead = x + (step.end - start) * slope
        x = ahead
    return x
