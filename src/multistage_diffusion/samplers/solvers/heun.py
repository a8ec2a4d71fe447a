"""EDM's sampler, Heun's method in sigma."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ...config import SamplingConfig
from ...config.sampling import SOLVERS
from ..spacings import Spacing
from .base import SLACK, AddNoise, Denoise, Plan, Solver, Step, first_order

LONGEST_STEP = 1.5  # the trapezoidal rule is in sigma: in a longer step the end slope has too much weight
LONGEST_UNCORRECTED = 6.0  # DDIM has one step per call, so it divides a longer step into two
FEW_CALLS = 20


@SOLVERS.add("heun")
class Heun(Solver):
    """Heun's method with churn (Karras et al. 2022, algorithms 1 and 2); the noise is added before the step.

    n sigmas need 2n - 1 calls, so `calls` is an upper limit and n = (calls + 1) // 2. If some steps are too long to be
    corrected, there are more sigmas instead (sampling.lower_final="always").
    """

    noise: ClassVar[str] = "churn"
    ends_at_zero: ClassVar[bool] = True

    @classmethod
    def fewest_calls(cls, config: SamplingConfig) -> int:
        """Return 3: of two sigmas."""
        return 3

    @classmethod
    def steps(cls, config: SamplingConfig, calls: int, spacing: Spacing, low: float, high: float) -> list[Step]:
        """Return the steps of Algorithm 2 (S_min = 0, S_max = inf, S_noise = 1); without churn it is Algorithm 1."""
        count = (calls + 1) // 2
        sigmas = spacing.points(high, low, count - 1)
        corrected = set(range(count - 1))
        if config.lower_final == "always":
            while (found := corrected_steps(sigmas, calls)) is None:
                sigmas = spacing.points(high, low, len(sigmas))
            corrected = found
        lift = 1.0 + min(config.churn / len(sigmas), math.sqrt(2.0) - 1.0)
        steps = []
        for i, (sigma, end) in enumerate(pairwise([*sigmas, 0.0])):
            start = sigma * lift
            made = (start, end) if i in corrected else (start,)
            steps.append(Step(calls=made, end=end, order=len(made), noise_std=math.sqrt(start**2 - sigma**2)))
        return steps

    def step(self, x: Tensor, step: Step, denoise: Denoise, add_noise: AddNoise) -> Tensor:
        """Make an Euler step and correct it with the slope at its end; with one call there is no correction.

        Slopes are written with the denoised images: in x + (end - start) slope, an x of sigma 1000 would round them to 1e-4.
        """
        start, *corrected = step.calls
        x, left = add_noise(x), step.end / start
        denoised = denoise(x, start)
        ahead = first_order(x, denoised, left)
        if corrected:
            ahead = ahead + (0.5 * (1.0 - left) / left) * (denoise(ahead, step.end) - denoised)
        return ahead

    @classmethod
    def shortcoming(cls, plan: Plan) -> str | None:
        """Return which step is too long, or that the calls are few."""
        calls = len(plan.calls)
        for step in plan.steps[:-1]:
            if step.length > SLACK * (LONGEST_STEP if step.order == 2 else LONGEST_UNCORRECTED):
                mend = "--lower-final always, or" if step.order == 2 else "another spacing, or"
                return (
                    f"heun: the step from sigma {step.calls[0]:.3g} to {step.end:.3g} is long, so that ddim may be better at "
                    f"{calls} calls; consider {mend} more calls"
                )
        if calls < FEW_CALLS - 1:  # sampling.calls is an upper limit: 20 can give a plan of 19 calls
            return f"heun: {calls} calls are few for it, so that ddim may be better; consider {FEW_CALLS} or more"
        return None


def corrected_steps(sigmas: Sequence[float], calls: int) -> set[int] | None:
    """Return the indices of the corrected steps along sigmas (and on to 0); None if `calls` allows more sigmas.

    The step to 0 and steps longer than LONGEST_STEP are not corrected. If the calls suffice for only some of the other
    steps, the last ones are corrected, because the correction has the largest effect there.
    """
    fit = [i for i, (start, end) in enumerate(pairwise(sigmas)) if math.log(start / end) <= LONGEST_STEP]
    unused = calls - len(sigmas)
    if len(fit) < unused - (calls % 2 == 0) and len(sigmas) < calls:
        return None
    return set(fit[max(0, len(fit) - unused) :]) if unused > 0 else set()
