"""How a run is sampled (solver, order, calls, range, guidance, last step), and evaluated while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import UserError, require
from ..registry import Registry
from .serialization import override

SOLVERS: Registry[Any] = Registry("sampling.solver", "multistage_diffusion.samplers.solvers")
SPACINGS: Registry[Any] = Registry("sampling.spacing", "multistage_diffusion.samplers.spacings")

MOST_CALLS = 100_000  # a plan with more calls takes too long to build and gains nothing


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """The sampler of a run, unless another one is given.

    Attributes:
        solver: "dpm" (DPM-Solver), "dpm++", "ddim", "heun", "ddpm", "ddpm-large" or another of SOLVERS.
        method: "singlestep" or "multistep", for solvers that have a choice (DPM-Solver families).
        order: for solvers that have a choice (DPM-Solver families: 1 to 3).
        calls: denoiser calls per image.
        spacing: "log-snr", "time" (of the run's schedule), "edm" (rho), "ldm" (latent diffusion's own steps of a discrete
            schedule, 951, 901 .. 1 in 20 calls), "leading" or "trailing" (those of diffusers' DDIM: 950, 900 .. 0 and 999, 949
            .. 49) or another of SPACINGS.
        sigma_min, sigma_max: where trajectories end and start; None: the schedule's own range.
        rho: for EDM spacing.
        churn: S_churn of Heun (Karras et al. 2022, Algorithm 2); 0 is deterministic.
        eta: stochasticity of DDIM.
        lower_final: which steps have a lower order than `order`. "always": the last step has order 1, and every step
            that is too long for its order has a lower one. "published": as in the solvers' papers; multistep then
            lowers its last orders only below 10 calls.
        denoise_last: whether the last call is at sigma_min and its output is the result, without the noise left at
            sigma_min. "auto": if that noise is visible (sigma_min of a grey level or more) and calls exceed the order.
        third_order: how multistep steps of order 3 (DPM-Solver families) weigh the second difference of the predictions.
            "exact": twice, as f'' is twice the second difference; this gives order 3. "published": once, as the solvers'
            authors' code does; the error then is of order 2.
        guidance: classifier-free guidance w of a class-conditional run, D = D_none + w (D_label - D_none): 0 is
            unconditional, 1 conditional; other values evaluate the network twice, in one batch.
        guidance_interval: (low, high); guidance acts only for low < sigma <= high. Elsewhere w is 1 and the network is
            evaluated once (Kynkäänniemi et al. 2024). None: everywhere.
        threshold: dynamic thresholding (Saharia et al. 2022) of pixels: each denoised image is clipped at the quantile
            `threshold` of its absolute values, at least 1, and divided by it. None: no thresholding.
        clip: bound of the absolute values of each denoised image of pixels (1 for the images' own range). DDIM keeps the
            noise of the image before clipping, as published code does. None: no clipping.
    """

    solver: str = "dpm"
    method: Literal["singlestep", "multistep"] = "singlestep"
    order: int = 3
    calls: int = 20
    spacing: str = "log-snr"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float = 7.0
    churn: float = 0.0
    eta: float = 0.0
    lower_final: Literal["always", "published"] = "always"
    denoise_last: Literal["auto", "always", "never"] = "auto"
    third_order: Literal["exact", "published"] = "exact"
    guidance: float = 1.0
    guidance_interval: tuple[float, float] | None = None
    threshold: float | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        solver = SOLVERS[self.solver]
        _ = SPACINGS[self.spacing]  # refuses an unknown name
        choices = {
            "order": solver.orders,
            "method": solver.methods,
            "lower_final": ("always", "published"),
            "denoise_last": ("auto", "always", "never"),
            "third_order": ("exact", "published"),
        }
        for name, known in choices.items():
            value = getattr(self, name)
            require(
                not known or value in known,
                f"sampling.{name}={value!r} must be one of {', '.join(map(repr, sorted(known)))} (solver {self.solver!r})",
            )
        require(0 < self.calls <= MOST_CALLS, f"sampling.calls={self.calls} must be positive, and at most {MOST_CALLS}")
        for name in ("sigma_min", "sigma_max"):
            value = getattr(self, name)
            require(value is None or 0 < value < math.inf, f"sampling.{name}={value} must be positive and finite")
        require(
            self.sigma_min is None or self.sigma_max is None or self.sigma_min < self.sigma_max,
            f"sampling.sigma_min={self.sigma_min} must be below sampling.sigma_max={self.sigma_max}",
        )
        require(0 < self.rho < math.inf, f"sampling.rho={self.rho} must be positive and finite")
        require(0 <= self.churn < math.inf, f"sampling.churn={self.churn} must be >= 0 and finite")
        require(0 <= self.eta <= 1, f"sampling.eta={self.eta} must be in [0, 1]")
        require(0 <= self.guidance < math.inf, f"sampling.guidance={self.guidance} must be >= 0 and finite")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            require(
                0 <= low < high < math.inf,
                f"sampling.guidance_interval={list(self.guidance_interval)} must be [low, high], 0 <= low < high, finite",
            )
        require(
            self.threshold is None or 0 < self.threshold <= 1,
            f"sampling.threshold={self.threshold} must be in (0, 1], e.g. 0.995",
        )
        require(self.clip is None or 0 < self.clip < math.inf, f"sampling.clip={self.clip} must be positive and finite")
        require(
            self.clip is None or self.threshold is None,
            f"sampling.clip={self.clip} and sampling.threshold={self.threshold} both bound the images; give one of them",
        )


def changed_sampler(own: SamplingConfig, changes: SamplingConfig | Mapping[str, Any] | None) -> SamplingConfig:
    """Return another sampler, or a run's own with changes.

    Args:
        own: the run's.
        changes: a whole sampler; or some of its settings, such as {"solver": "heun", "calls": 35}. Order and method that the
            new solver does not have become its default. None: none.

    Raises:
        UserError: if a setting is unknown, or the new solver has no such setting.
    """
    if changes is None or isinstance(changes, SamplingConfig):
        return changes or own
    given = dict(changes)
    name = given.get("solver", own.solver)
    solver = SOLVERS[name]
    for setting, known in (("order", solver.orders), ("method", solver.methods)):
        if setting in given and not known:
            raise UserError(f"sampling.{setting}={given[setting]!r}: has no meaning for solver {name!r}; leave it out")
        if setting not in given and known and getattr(own, setting) not in known:
            given[setting] = known[0]
    return override(own, given)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation during training: the Fréchet distance of samples to a reference.

    Attributes:
        every: steps between evaluations; the last step is always evaluated; 0: no evaluations.
        features: name of the feature extractor.
        count: samples per evaluation, always from the same noise.
        seed: seed of that noise.
        reference: statistics of images (an .npz file of msdiff stats); empty: the run's own training images.
        metrics: names of further metrics that are logged; the Fréchet distance alone selects the best checkpoint.
        patience: evaluations without a new best after which training ends; 0: never.
    """

    every: int = 0
    features: str = "pixels"
    count: int = 1000
    seed: int = 0
    reference: str = ""
    metrics: tuple[str, ...] = ()
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "seed", "patience"):
            require(getattr(self, name) >= 0, f"evaluation.{name}={getattr(self, name)} must be >= 0")
        require(self.count >= 2, f"evaluation.count={self.count} must be at least 2: one sample has no covariance")
        require(bool(self.features), "evaluation.features is empty; name a feature extractor, such as pixels")
