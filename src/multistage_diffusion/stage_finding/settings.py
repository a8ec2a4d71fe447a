"""Settings of stage finding."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import UserError
from .boundaries import Objective, Rule
from .similarity import Space

Algorithm = Literal[1, 2, "timestep", "snr", "gradient"]
StageDenoiser = Literal["optimal", "gaussian"]
BASELINES: tuple[Algorithm, ...] = ("timestep", "snr", "gradient")  # draw no samples of the optimal denoiser
NODES = 41  # times of algorithm 2
IMAGES = 4096  # whose covariance is measured, denoiser "gaussian"
# Default limit of samples with `precision`; algorithm 2 stores all pairs of times of each sample.
MOST_SAMPLES = {1: 1_000_000, 2: 20_000}


def require_setting(condition: bool, message: str) -> None:
    """Raise UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(f"stages: {message}")


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """Settings of stage finding.

    Attributes:
        algorithm: 1 (three stages, by similarity to the two limits), 2 (any number, by clustering), or a baseline:
            "timestep" or "snr" (even in time or log-SNR, independent of the data), "gradient" (gradients of a trained
            run's loss).
        denoiser: the denoiser whose outputs are compared: "optimal" (the optimal denoiser of the images, as published) or
            "gaussian" (algorithm 2 only): the Wiener denoiser of their mean and covariance, compared by the network's
            output over the training density; see `gaussian`.
        density: for denoiser "gaussian": the training density that is "given", or the one proposed from the images ("auto",
            see `gaussian.propose_density`).
        stages: the number n of stages; 3 for algorithm 1.
        samples: with denoiser "gaussian" the number of images whose covariance is measured, by default 4,096. Otherwise the
            number K of noisy images, with `precision` the maximum. None: 1,000; with `precision` 1,000,000
            (algorithm 1) or 20,000 (algorithm 2). Algorithm 1 compares each sample at `times` times, algorithm 2 at all
            pairs of `nodes` times.
        times: times per sample (algorithm 1). 1 with 50,000 samples is the published estimator.
        nodes: times of algorithm 2, evenly spaced in t; its edges are among them. The published run had 21.
        precision: half-width of the edges' 95 % intervals, in t, at which sampling stops; None: draw `samples` samples.
        eta: largest difference of a coordinate that counts as agreement, in the units of `space`.
        alpha: similarity threshold of the outer stages (algorithm 1).
        rule: "interval-mean" (published) or "pointwise"; see `boundaries.ThreeStages` (algorithm 1).
        space: quantity to compare: "eps" (noise predictions; invariant to a common scale of data and sigma) or "x0"
            (posterior means, in units of the data). None: "eps" for algorithm 1 and "x0" for algorithm 2, as published.
        objective: "total-distance" (eq. 21) or "mean-similarity" (the published run; a group of a single time has the
            maximum score 1, so single times may become stages); see `boundaries.optimal_partition` (algorithm 2).
        data_range: (low, high) onto which images are mapped. It is the network's training range and sets the units of
            the sigma edges. The published edges are for (0, 1). None: floats (latents) are used unchanged.
        seed: determines the samples.
        grid: number of candidate times for algorithm 1's edges.

    Raises:
        UserError: naming the field and the value.
    """

    algorithm: Algorithm = 1
    denoiser: StageDenoiser = "optimal"
    density: Literal["given", "auto"] = "given"
    stages: int = 3
    samples: int | None = None
    times: int = 32
    nodes: int = NODES
    precision: float | None = None
    eta: float = 2 / 256
    alpha: float = 0.9
    rule: Rule = "interval-mean"
    space: Space | None = None
    objective: Objective = "total-distance"
    data_range: tuple[float, float] | None = (-1.0, 1.0)
    seed: int = 0
    grid: int = 10_000

    def __post_init__(self) -> None:
        algorithms = get_args(Algorithm)
        require_setting(
            self.algorithm in algorithms, f"algorithm={self.algorithm} must be one of {', '.join(map(str, algorithms))}"
        )
        require_setting(
            self.denoiser in get_args(StageDenoiser),
            f"denoiser={self.denoiser!r} must be one of {', '.join(get_args(StageDenoiser))}",
        )
        require_setting(self.density in ("given", "auto"), f"density={self.density!r} must be one of given, auto")
        require_setting(
            self.denoiser == "gaussian" or self.density == "given",
            f"density={self.density}: only denoiser gaussian uses a training density; give denoiser gaussian, too",
        )
        if self.denoiser == "gaussian":
            require_setting(self.algorithm == 2, f"algorithm={self.algorithm}: denoiser gaussian needs algorithm 2")
            for name, meaning in (("precision", "noisy images"), ("space", "another quantity")):
                require_setting(
                    getattr(self, name) is None,
                    f"{name}={getattr(self, name)}: denoiser gaussian has no {meaning} to choose; leave it out",
                )
        require_setting(1 <= self.stages <= 1000, f"stages={self.stages} must be at least 1 and at most 1000")
        require_setting(
            self.algorithm != 1 or self.stages == 3,
            f"stages={self.stages}: algorithm 1 finds three stages; use algorithm 2 for another number",
        )
        require_setting(
            self.samples is None or self.samples >= 100, f"samples={self.samples} must be at least 100, to average over"
        )
        require_setting(1 <= self.times <= 10**6, f"times={self.times} must be at least 1 and at most a million")
        require_setting(3 <= self.nodes <= 1001, f"nodes={self.nodes} must be at least 3 and at most 1001")
        require_setting(
            self.nodes == NODES or (self.algorithm == 2 and self.denoiser == "optimal"),
            f"nodes={self.nodes}: only algorithm 2 with denoiser optimal has such a grid; leave it out",
        )
        require_setting(
            self.precision is None or 1e-6 <= self.precision < 1, f"precision={self.precision} must be in [1e-6, 1)"
        )
        require_setting(0 < self.eta < math.inf, f"eta={self.eta} must be positive and finite")
        require_setting(0 < self.alpha <= 1, f"alpha={self.alpha} must be in (0, 1]")
        for name, known in (
            ("rule", ("interval-mean", "pointwise")),
            ("space", (None, "eps", "x0")),
            ("objective", ("total-distance", "mean-similarity")),
        ):
            require_setting(getattr(self, name) in known, f"{name}={getattr(self, name)!r} must be one of {known}")
        if self.data_range is not None:
            low, high = self.data_range
            require_setting(
                -math.inf < low < high < math.inf, f"data_range={self.data_range} must be finite and ascending"
            )
        require_setting(self.grid >= 10, f"grid={self.grid} must be at least 10")

    def resolved(self) -> StageSettings:
        """Return a copy with the algorithm's defaults for `samples` and `space`; baselines have neither."""
        if self.algorithm in BASELINES:
            return dataclasses.replace(self, samples=None, precision=None, space=None)
        if self.denoiser == "gaussian":
            return dataclasses.replace(self, samples=self.samples or IMAGES)
        most = MOST_SAMPLES[2 if self.algorithm == 2 else 1]
        samples = self.samples or (most if self.precision is not None else 1000)
        return dataclasses.replace(self, samples=samples, space=self.space or ("eps" if self.algorithm == 1 else "x0"))
