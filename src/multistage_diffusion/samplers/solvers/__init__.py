"""Solvers: how a trajectory is divided into steps, and one step.

A module here that registers a `Solver`, with `@SOLVERS.add("name")` (of config.sampling), adds one.
"""

from .base import AddNoise as AddNoise
from .base import Denoise as Denoise
from .base import Plan as Plan
from .base import Solver as Solver
from .base import Step as Step
