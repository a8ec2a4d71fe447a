"""Samplers: a plan of steps computed on the host, and the trajectories that follow it."""

from .advice import shortcoming
from .orders import multistep_orders, singlestep_orders
from .plan import make_plan
from .solvers import Plan, Solver, Step
from .spacings import Spacing
from .trajectories import Noise, sample, start_noise, step_noise

__all__ = [
    "Noise",
    "Plan",
    "Solver",
    "Spacing",
    "Step",
    "make_plan",
    "multistep_orders",
    "sample",
    "shortcoming",
    "singlestep_orders",
    "start_noise",
    "step_noise",
]
