"""One noise level in the conventions of different code: sigma, log-SNR, times, shifted times, steps, boundary_ratio.

Trainers of two-expert models compare a noise level with a boundary. Some compare the time before the shift, others the
time after it; the same number then divides the noise at different levels. Here every convention is converted through
sigma, the noise-to-signal ratio.

Rectified flow mixes x = (1 - t) y + t n. With a shift s (Esser et al. 2024, "Scaling rectified flow transformers for
high-resolution image synthesis", equation 23) a time u that is drawn or listed evenly becomes t = s u / (1 + (s - 1) u);
the inverse is u = t / (s - (s - 1) t).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .errors import require
from .schedules.vp import VP

STEPS = 1000  # of the schedulers of most released models
_ROUNDING = 1e-9  # a step this close to the boundary, as a share of all steps, is on it
_LEAST, _MOST = 1e-12, 1e12  # sigma of a boundary


@dataclass(frozen=True, kw_only=True)
class Boundary:
    """A noise level between two experts (or stages), in the conventions of different code.

    Attributes:
        sigma: noise-to-signal ratio, positive.
        shift: the shift s of the rectified-flow times, at least 1e-3; 1 is none.
        steps: number N of steps, at u = 1, 1 - 1/N, .., 1/N, highest noise first.

    Raises:
        UserError: naming the value that is outside its range.
    """

    sigma: float
    shift: float = 1.0
    steps: int = STEPS

    def __post_init__(self) -> None:
        _require_shift(self.shift, self.steps)
        require(_LEAST <= self.sigma <= _MOST, f"sigma={self.sigma:g} must be between 1e-12 and 1e12")

    @property
    def log_snr(self) -> float:
        """-2 ln sigma."""
        return -2.0 * math.log(self.sigma) + 0.0  # no minus zero

    @property
    def t_vp(self) -> float | None:
        """Time of VP (beta from 0.1 to 20); None if this noise is beyond t = 1."""
        time = float(VP().time(self.sigma))
        return time if time <= 1.0 else None

    @property
    def t_edm(self) -> float:
        """Time of EDM: sigma itself."""
        return self.sigma

    @property
    def t_shifted(self) -> float:
        """t = sigma / (1 + sigma) of rectified flow, after the shift: what is mixed and what the network is told."""
        return self.sigma / (1.0 + self.sigma)

    @property
    def t_flow(self) -> float:
        """u = t / (s - (s - 1) t) of rectified flow, before the shift: what is drawn in training and listed evenly."""
        # in terms of sigma, without the cancellation near t = 1
        return self.sigma / (self.shift + self.sigma)

    @property
    def boundary_ratio(self) -> float:
        """The setting of diffusers' two-expert pipelines, which compare it with the time after the shift."""
        return self.t_shifted

    @property
    def index(self) -> float:
        """1 - u: where in the list of steps the boundary is, and the share of evenly drawn u at or above it."""
        return self.shift / (self.shift + self.sigma)

    @property
    def step(self) -> float:
        """index N: the number of the step on the boundary, from 0 for the highest noise; in general no integer."""
        return self.index * self.steps

    @property
    def steps_above(self) -> int:
        """How many of the N steps are at or above the boundary: those of the expert for high noise."""
        return min(self.steps, math.floor(self.step + _ROUNDING * self.steps) + 1)

    def conventions(self) -> dict[str, float | None]:
        """Return {convention: value} for all conventions of CONVENTIONS; None where the noise has no value."""
        return {name: getattr(self, name.replace("-", "_")) for name in CONVENTIONS}


def _require_shift(shift: float, steps: int) -> None:
    require(1e-3 <= shift <= 1e3, f"shift={shift:g} must be between 0.001 and 1000; 1 is none")
    require(1 <= steps <= 10**9, f"steps={steps} must be between 1 and 10^9")


def _flow(value: float, shift: float) -> float:
    """Return sigma of u = value, before the shift."""
    return shift * value / (1.0 - value)


# name: (its range, sigma of (value, shift, steps))
_SIGMA: dict[str, tuple[tuple[float, float], Callable[[float, float, int], float]]] = {
    "sigma": ((0.0, math.inf), lambda value, shift, steps: value),
    "log-snr": ((-math.inf, math.inf), lambda value, shift, steps: math.exp(-0.5 * value)),
    "t-vp": ((0.0, 1.0), lambda value, shift, steps: float(VP().sigma(value))),
    "t-edm": ((0.0, math.inf), lambda value, shift, steps: value),
    "t-flow": ((0.0, 1.0), lambda value, shift, steps: _flow(value, shift)),
    "t-shifted": ((0.0, 1.0), lambda value, shift, steps: _flow(value, 1.0)),
    "boundary-ratio": ((0.0, 1.0), lambda value, shift, steps: _flow(value, 1.0)),
    "index": ((0.0, 1.0), lambda value, shift, steps: shift * (1.0 - value) / value),
    "step": ((0.0, math.inf), lambda value, shift, steps: shift * (steps - value) / value),
}
CONVENTIONS = tuple(_SIGMA)
_CLOSED = ("t-vp",)  # ranges whose upper end has a finite sigma


def boundary(value: float, convention: str = "sigma", *, shift: float = 1.0, steps: int = STEPS) -> Boundary:
    """Return a noise level that is given in one convention, with its values in all others.

    Args:
        value: the boundary.
        convention: what the value is. "sigma"; "log-snr" (-2 ln sigma); "t-vp" (VP's time); "t-edm" (EDM's time, sigma);
            "t-flow" (rectified flow's time before the shift); "t-shifted" (after the shift) and "boundary-ratio"
            (diffusers' setting), which are the same; "index" (1 - t-flow); "step" (of `steps`, 0 for the highest noise).
        shift: the shift of rectified flow, 1 for none.
        steps: number of steps.

    Returns:
        The boundary; its attributes are its values in all conventions.

    Raises:
        UserError: for an unknown convention, or a value outside its range.
    """
    require(convention in CONVENTIONS, f"convention={convention!r} must be one of {', '.join(CONVENTIONS)}")
    _require_shift(shift, steps)
    (low, high), sigma_of = _SIGMA[convention]
    high = float(steps) if convention == "step" else high
    inside = low < value < high or (value == high and convention in _CLOSED)
    require(inside, f"{convention}={value:g} must be {_range_text(low, high, closed=convention in _CLOSED)}")
    require(convention != "log-snr" or abs(value) <= 55, f"log-snr={value:g} must be between -55 and 55")
    sigma = sigma_of(float(value), shift, steps)
    if convention != "sigma":
        within = _LEAST <= sigma <= _MOST
        require(within, f"{convention}={value!r} is sigma {sigma:g}, which must be between 1e-12 and 1e12")
    return Boundary(sigma=sigma, shift=shift, steps=steps)


def _range_text(low: float, high: float, *, closed: bool) -> str:
    if math.isinf(low):
        return "finite"
    return f"above {low:g} and " + ("finite" if math.isinf(high) else f"{'at most' if closed else 'below'} {high:g}")


def boundary_lines(found: Boundary) -> list[str]:
    """Return a boundary in all conventions as lines of text."""
    shifted = "" if found.shift == 1 else f", shift {found.shift:g}"
    meaning = {
        "sigma": "noise-to-signal ratio",
        "log-snr": "-2 ln sigma",
        "t-vp": "time of VP",
        "t-edm": "time of EDM",
        "t-flow": f"time of rectified flow before the shift{shifted}",
        "t-shifted": "time of rectified flow after the shift",
        "boundary-ratio": "diffusers' setting, compared after the shift",
        "index": "1 - t-flow: share of evenly drawn times at or above",
        "step": f"of {found.steps}, 0 for the highest noise; at or above it: {found.steps_above}",
    }
    values = found.conventions()
    return [
        f"{name:<15} {'beyond its range' if (value := values[name]) is None else f'{value:.6g}':<12} {text}"
        for name, text in meaning.items()
    ]
