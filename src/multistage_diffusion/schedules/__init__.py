"""Noise schedules and training densities: the only place where a time becomes a sigma.

All other code describes noise by sigma, the noise-to-signal ratio of x = s(t) (y + sigma n); log-SNR is -2 ln sigma.
All formulas use float64 and expm1 / log1p, so they are accurate near both ends. A module here that registers a class,
with `@SCHEDULES.add("name")` or `@PRIORS.add("name")`, adds a schedule or a density.
"""

from .base import SCHEDULES as SCHEDULES
from .base import NoiseSchedule as NoiseSchedule
from .base import VariancePreserving as VariancePreserving
from .priors import PRIORS as PRIORS
from .priors import LogNormal as LogNormal
from .priors import SigmaPrior as SigmaPrior
from .priors import UniformTime as UniformTime
from .priors import clamp_half_open as clamp_half_open
