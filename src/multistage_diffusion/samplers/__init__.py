"""Samplers: a plan of steps computed on the host, and the solvers that execute it."""

from .advice import shortcoming
from .orders import multistep_orders, singlestep_orders
from .plan import Plan, Step, make_plan
from .solvers import Noise, sample, start_noise, step_noise

__all__ = [
    "Noise",
    "Plan",
    "Step",
    "make_plan",
    "multistep_orders",
    "sample",
    "shortcoming",
    "singlestep_orders",
    "start_noise",
    "step_noise",
]
