"""The base of all solvers, and the plans that they follow."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from ...config import SamplingConfig
from ..spacings import Spacing

Denoise = Callable[[Tensor, float], Tensor]  # (state, sigma) -> denoised
AddNoise = Callable[[Tensor], Tensor]  # state -> state with the step's noise

SLACK = 1.05  # a step may exceed the maximum length of its order by this factor without a warning


@dataclass(frozen=True, kw_only=True)
class Step:
    """One outer step.

    Attributes:
        calls: the sigmas of the denoiser calls, in order; the step starts at the first one.
        end: the sigma at which the step ends; 0 for a final call whose output is the result, and where the solver ends at 0.
        order: order of the update.
        noise_std: standard deviation of the noise that the solver adds in the step; 0 for none.
        curvature: weight of the second difference in a multistep step of order 3 (sampling.third_order).
        clip: bound of the absolute values of the denoised image, where the solver clips it itself; None: no bound.
    """

    calls: tuple[float, ...]
    end: float
    order: int
    noise_std: float = 0.0
    curvature: float = 2.0
    clip: float | None = None

    @property
    def length(self) -> float:
        """Length in ln sigma; infinite for a step to 0."""
        return math.log(self.calls[0] / self.end) if self.end > 0 else math.inf


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The steps of a trajectory, as float64 numbers on the host.

    Attributes:
        solver, method: as in SamplingConfig.
        steps: the outer steps, sigma descending.
        initial_noise_std: standard deviation of the unscaled starting noise.
    """

    solver: str
    method: str
    steps: tuple[Step, ...]
    initial_noise_std: float

    @property
    def calls(self) -> tuple[float, ...]:
        """The sigmas of all denoiser calls, in order."""
        return tuple(sigma for step in self.steps for sigma in step.calls)

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return any(step.noise_std > 0 for step in self.steps)


def first_order(x: Tensor, denoised: Tensor, left: float) -> Tensor:
    """Return the state after a step in which the denoised image is constant: Euler's method in sigma, and DDIM.

    Unlike x + (end - start) (x - denoised) / start, it keeps float32's precision where x is much larger than images.

    Args:
        x: state at the start.
        denoised: of it.
        left: the share of the noise that is left, sigma at the end / sigma at the start.
    """
    return left * x + (1.0 - left) * denoised


class Solver(ABC):
    """A solver of dx/dsigma = (x - D(x; sigma))/sigma (Karras et al. 2022, eq. 1 and 3).

    This is every schedule's probability-flow ODE in unscaled coordinates x = y + sigma n, in which all states are.
    An object follows one trajectory; it may remember earlier steps.

    Attributes:
        orders: values of sampling.order, its own choice first; empty if it has no choice.
        methods: values of sampling.method, its own choice first; empty if it has no choice.
        noise: the setting that makes it stochastic, "churn" or "eta"; empty if no setting does.
        ends_at_zero: whether its steps end at sigma 0. Otherwise they end at sigma_min, where sampling.denoise_last
            may spend a last call on the noise that is left.
        clips: whether its steps clip the denoised image (sampling.clip) themselves.
    """

    orders: ClassVar[tuple[int, ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ()
    noise: ClassVar[str] = ""
    ends_at_zero: ClassVar[bool] = False
    clips: ClassVar[bool] = False

    @classmethod
    def fewest_calls(cls, config: SamplingConfig) -> int:
        """Return the least number of calls of a plan."""
        return 1

    @classmethod
    def steps(cls, config: SamplingConfig, calls: int, spacing: Spacing, low: float, high: float) -> list[Step]:
        """Return the steps of a trajectory; here each has one call.

        Args:
            config: the sampler's.
            calls: number of denoiser calls, at least `fewest_calls`; they need not all be made.
            spacing: gives the sigmas between two.
            low: where the trajectory ends, > 0; a solver that ends at 0 goes on from there.
            high: where it starts.
        """
        return [Step(calls=(s,), end=t, order=1) for s, t in pairwise(spacing.points(high, low, calls))]

    @abstractmethod
    def step(self, x: Tensor, step: Step, denoise: Denoise, add_noise: AddNoise) -> Tensor:
        """Return the state at the end of a step.

        Args:
            x: the state at its start (B, ...).
            step: of the plan; its calls must be made in order.
            denoise: returns the denoised state, of x's dtype.
            add_noise: adds noise of standard deviation step.noise_std to a state; at most one call a step.
        """

    @classmethod
    def shortcoming(cls, plan: Plan) -> str | None:
        """Return one line on why a plan is likely to be over 10 % worse than DDIM at the same calls, or None."""
        return None
