"""DPM-Solver and DPM-Solver++ (Lu et al. 2022a, "DPM-Solver"; 2022b, "DPM-Solver++").

DPM-Solver's updates are those of the scaled state divided by s(t). With lambda = -ln sigma and a step of length h in
lambda from sigma_s to sigma_t, the two exponential integrators are

    noise prediction, f = (x - D)/sigma:   x_t = x_s - sigma_t sum_k h^k phi_k(h) f^(k-1)
    data prediction,  f = D:               x_t = (sigma_t/sigma_s) x_s + sum_k h^k phi_k(-h) f^(k-1)

where phi_1(z) = (e^z - 1)/z, phi_2 = (phi_1 - 1)/z, phi_3 = (phi_2 - 1/2)/z. The derivatives f^(k) in lambda are
estimated from inner points (singlestep) or from earlier steps (multistep). At order 2 both papers replace phi_2 by
phi_1/2, which has the same order of accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import ClassVar

from torch import Tensor

from ...config import SamplingConfig
from ...config.sampling import SOLVERS
from ..orders import lowered_multistep_orders, lowered_singlestep_orders, multistep_orders, singlestep_orders
from ..spacings import Spacing
from .base import SLACK, AddNoise, Denoise, Plan, Solver, Step, first_order

LONGEST_LAST_STEP = 1.5  # for a last step of order 2 or 3


@SOLVERS.add("dpm")
class DPMSolver(Solver):
    """DPM-Solver: noise prediction.

    Attributes:
        data: whether the prediction is of data instead of noise.
        longest: by method, the maximum step length in ln sigma for each order; orders that are not listed have no
            limit (docs/sampling.md).
    """

    orders: ClassVar[tuple[int, ...]] = (3, 2, 1)
    methods: ClassVar[tuple[str, ...]] = ("singlestep", "multistep")
    data: ClassVar[bool] = False
    # Order 2 weights the second output by (sigma_s - sigma_t) / 2 r1 for every h. The exact weight falls as 1/h, so
    # long steps overshoot, with errors up to sigma_s.
    longest: ClassVar[Mapping[str, Mapping[int, float]]] = {"singlestep": {2: 1.5, 3: 2.0}}

    def __init__(self) -> None:
        self.past: list[tuple[float, Tensor]] = []  # (lambda, prediction) of earlier steps, newest first

    @classmethod
    def fewest_calls(cls, config: SamplingConfig) -> int:
        """Return the order."""
        return config.order

    @classmethod
    def steps(cls, config: SamplingConfig, calls: int, spacing: Spacing, low: float, high: float) -> list[Step]:
        """Return steps that make `calls` calls, of the orders of sampling.lower_final."""
        make = cls._multistep if config.method == "multistep" else cls._singlestep
        return make(config, spacing.points(high, low, calls), spacing)

    @classmethod
    def _multistep(cls, config: SamplingConfig, sigmas: list[float], spacing: Spacing) -> list[Step]:
        if config.lower_final == "published":
            orders = multistep_orders(len(sigmas) - 1, config.order)
        else:
            orders = lowered_multistep_orders(sigmas, config.order, cls.longest.get("multistep", {}))
        curvature = 1.0 if config.third_order == "published" else 2.0
        return [
            Step(calls=(s,), end=t, order=o, curvature=curvature)
            for (s, t), o in zip(pairwise(sigmas), orders, strict=True)
        ]

    @classmethod
    def _singlestep(cls, config: SamplingConfig, sigmas: list[float], spacing: Spacing) -> list[Step]:
        """Return steps whose calls are equidistant in the spacing's coordinate.

        Exception: with lower_final="published" and log-SNR spacing, steps have equal length. Inner points divide their
        step evenly in the same coordinate.
        """
        published = config.lower_final == "published"
        if published:
            orders = singlestep_orders(len(sigmas) - 1, config.order)
        else:
            orders = lowered_singlestep_orders(sigmas, config.order, cls.longest.get("singlestep", {}))
        if published and config.spacing == "log-snr":
            outer = spacing.points(sigmas[0], sigmas[-1], len(orders))
        else:
            outer = [sigmas[i] for i in accumulate(orders, initial=0)]
        return [
            Step(calls=tuple(spacing.points(start, end, order)[:-1]), end=end, order=order)
            for (start, end), order in zip(pairwise(outer), orders, strict=True)
        ]

    def step(self, x: Tensor, step: Step, denoise: Denoise, add_noise: AddNoise) -> Tensor:
        """Make a step from its inner points, or else from earlier steps; of order 1 it needs neither."""
        start, *inner = step.calls
        flow = _flow(start, step.end, self.data)
        denoised = denoise(x, start)
        f0 = self._prediction(x, denoised, start)
        ahead = first_order(x, denoised, step.end / start)
        if inner:
            return ahead + self._from_inner_points(denoise, x, step, flow, denoised, f0)
        self.past = [(-math.log(start), f0), *self.past[:2]]
        return ahead + self._from_past(step, flow) if step.order > 1 else ahead

    @classmethod
    def shortcoming(cls, plan: Plan) -> str | None:
        """Return which step is too long for its order."""
        longest = cls.longest.get(plan.method, {})
        steps = [step for step in plan.steps if step.end > 0]
        for step in steps:
            allowed = longest.get(step.order, math.inf)
            if step is steps[-1] and step.order > 1:
                allowed = min(allowed, LONGEST_LAST_STEP)
            if step.length > SLACK * allowed:
                which = "last step" if step is steps[-1] else "step"
                return (
                    f"{plan.solver} {plan.method}: the {which} from sigma {step.calls[0]:.3g} to {step.end:.3g} is long for "
                    f"order {step.order}, so that ddim may be better at {len(plan.calls)} calls; consider --lower-final always"
                )
        return None

    def _prediction(self, x: Tensor, denoised: Tensor, sigma: float) -> Tensor:
        return denoised if self.data else (x - denoised) / sigma

    def _from_inner_points(
        self, denoise: Denoise, x: Tensor, step: Step, flow: _Flow, denoised: Tensor, f0: Tensor
    ) -> Tensor:
        """Return the derivatives' part of DPM-Solver-2, -3 (2022a, algorithms 1 and 2) or 2S, 3S.

        r1, r2 follow from the inner points. Order 3 needs r2 = 2/3 up to O(h). This holds for every smooth spacing, and
        exactly for log-SNR spacing.
        """
        start, *inner = step.calls
        r1 = _flow(start, inner[0], self.data).h / flow.h
        x1 = first_order(x, denoised, inner[0] / start)
        d1 = self._prediction(x1, denoise(x1, inner[0]), inner[0]) - f0
        if step.order == 2:
            return (0.5 / r1 * flow.w1) * d1
        to2 = _flow(start, inner[1], self.data)
        r2 = to2.h / flow.h
        x2 = first_order(x, denoised, inner[1] / start) + (r2 / r1 * to2.w2) * d1
        d2 = self._prediction(x2, denoise(x2, inner[1]), inner[1]) - f0
        return (flow.w2 / r2) * d2

    def _from_past(self, step: Step, flow: _Flow) -> Tensor:
        """Return the derivatives' part of Adams-Bashforth in lambda (2022b, Algorithm 2).

        Order 3 estimates f' and f'' by divided differences. f'' is twice the second difference (`step.curvature`);
        without the factor 2, as in the published code, the order is lost.
        """
        (lambda0, f0), (lambda1, f1) = self.past[:2]
        first = (f0 - f1) / (lambda0 - lambda1)
        if step.order == 2:
            return (0.5 * flow.w1 * flow.h) * first
        lambda2, f2 = self.past[2]
        second = (first - (f1 - f2) / (lambda1 - lambda2)) / (lambda0 - lambda2)
        slope = first + (lambda0 - lambda1) * second
        return (flow.w2 * flow.h) * slope + (step.curvature * flow.w3 * flow.h**2) * second


@SOLVERS.add("dpm++")
class DPMSolverPlusPlus(DPMSolver):
    """DPM-Solver++: data prediction."""

    data: ClassVar[bool] = True
    # Order 3 extrapolates a parabola over steps that grow towards low noise.
    longest: ClassVar[Mapping[str, Mapping[int, float]]] = {"multistep": {3: 1.0}}


@dataclass(frozen=True)
class _Flow:
    """The exact solution over one step: x_t = c x_s + w1 f + w2 (h f') + w3 (h² f'') + .., derivatives at s.

    c x_s + w1 f is the same for both predictions, `first_order`.
    """

    h: float
    w1: float
    w2: float
    w3: float


def _flow(sigma_s: float, sigma_t: float, data: bool) -> _Flow:
    h = math.log(sigma_s / sigma_t)
    z = -h if data else h
    factor = h if data else -sigma_t * h
    phi1 = math.expm1(z) / z
    phi2 = (phi1 - 1.0) / z
    phi3 = (phi2 - 0.5) / z
    return _Flow(h, factor * phi1, factor * phi2, factor * phi3)
