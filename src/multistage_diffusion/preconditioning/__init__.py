"""Preconditionings: what a network is given, and what its output means.

Every parameterisation is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) on unscaled x = y + sigma n (Karras et al.
2022, eq. 7). The loss is the plain squared error of F, i.e. the denoising error weighted by 1/c_out². Depending on the
preconditioning, it is exactly eps-prediction, EDM's loss or velocity matching. A module here that registers a class,
with `@PRECONDITIONINGS.add("name")` (of config.run), adds one.
"""

from .base import Coefficients as Coefficients
from .base import Preconditioning as Preconditioning
from .base import make_preconditioning as make_preconditioning
from .base import per_row as per_row
