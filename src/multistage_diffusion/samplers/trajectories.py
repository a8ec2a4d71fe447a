"""Trajectories from noise to images along a plan.

They end at sigma_min or at 0: at 0 if the solver does, or if the output of a last denoiser call at sigma_min is the
result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from .. import rng
from ..config.sampling import SOLVERS
from ..contracts import Conditioning, Denoiser
from ..errors import NotFiniteError, UserError
from ..progress import Progress
from .solvers import Plan, Solver

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
    return rng.normal((seed, "sampling", "start"), indices, shape, torch.float64).mul_(plan.initial_noise_std).to(dtype)


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
        denoiser: any Denoiser; called with sigma as a float, which costs no device synchronisation.
        start: unscaled starting states (B, ...), e.g. from `start_noise`.
        plan: from `make_plan`.
        cond: labels, passed to every call.
        noise: maps a step index to unit noise of start's shape, e.g. from `step_noise`; needed if the plan is stochastic.
        progress: called after each denoiser call with (calls made, total calls).

    Returns:
        The unscaled states at the end of the plan, shaped like start: float64 if start is float64, else float32.

    Raises:
        UserError: if the plan is stochastic and `noise` is None.
        NotFiniteError: if the result is not finite.
    """
    if plan.stochastic and noise is None:
        raise UserError(f"noise=None: {plan.solver} draws noise in each step; pass step_noise(...)")
    made, total = 0, len(plan.calls)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        nonlocal made
        denoised = denoiser(x, sigma, cond).to(x.dtype)
        made += 1
        if progress is not None:
            progress(made, total)
        return denoised

    x = start if start.dtype == torch.float64 else start.float()
    solver: Solver = SOLVERS[plan.solver]()
    denoises_last = not solver.ends_at_zero and plan.steps[-1].end == 0
    for number, step in enumerate(plan.steps[:-1] if denoises_last else plan.steps):
        x = solver.step(x, step, denoise, partial(_add_noise, step.noise_std, noise, number))
    if denoises_last:
        x, clip = denoise(x, plan.steps[-1].calls[0]), plan.steps[-1].clip
        x = x if clip is None else x.clamp(-clip, clip)
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        end = plan.steps[-1].end
        raise NotFiniteError(f"{bad} of {len(x)} samples are not finite at the trajectory's end, sigma={end:.6g}")
    return x


def _add_noise(std: float, noise: Noise | None, step: int, x: Tensor) -> Tensor:
    if std == 0:
        return x
    assert noise is not None  # `sample` raises for a stochastic plan without noise
    return x + std * noise(step).to(x)
