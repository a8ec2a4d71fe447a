"""The result of stage finding: stage edges, their confidence intervals and their provenance."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .. import files
from ..config import DiffusionConfig, serialization
from ..errors import UserError
from ..records import FINITE, WHOLE, check, listed, maybe
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from ..stages import Stages
from .edge_preview import decode_png
from .settings import BASELINES, Algorithm, StageSettings, require_setting

FORMAT_VERSION = 3
_CURVES: dict[Algorithm | Literal["gaussian"], tuple[str, ...]] = {
    1: ("t", "s0", "s1", "s0_error", "s1_error"),
    2: ("t", "similarity", "objective_value", "table"),
    "timestep": ("t", "value", "objective_value"),
    "snr": ("t", "value", "objective_value"),
    "gradient": ("t", "similarity", "objective_value", "steps", "table"),
    "gaussian": ("sigma", "distance", "objective_value", "table", "half_edges_sigma", "proposed_density"),
}
_LINE = {  # of the table
    "stages": WHOLE,
    "edges_t": listed(FINITE),
    "edges_sigma": listed(FINITE),
    "distance": FINITE,
    "distance_held_out": maybe(FINITE),
}
_DERIVED = ("data_range", "rule")  # top-level copies of settings


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """Stage edges and their provenance.

    Attributes:
        edges_t: the n - 1 interior edges, ascending, in the time of `schedule`.
        edges_sigma: the same edges as noise-to-signal ratios, in units of `data_range`.
        schedule: the kernel of `edges_t`.
        time_measure: the kernel in whose time averages over t are uniform; `curves` are in this time.
        settings: the settings used, with defaults filled in.
        fingerprint: of the images used, or empty.
        intervals_t, intervals_sigma: 95 % interval (low, high) of every edge; covers the Monte Carlo error only. Empty
            for baselines. For denoiser "gaussian": the variation over draws of the images.
        samples: number of noisy images drawn; of images whose covariance was measured for denoiser "gaussian"; 0 for
            baselines.
        float64_difference: largest difference of a similarity from its float64 value, on some of the samples.
        curves: plain lists and numbers. Algorithm 1: binned "t" with the means "s0" and "s1" and their standard errors.
            Algorithm 2: nodes "t", the matrix "similarity", "objective_value" and "table" (edges and mean distance
            within a stage for 1 to 8 stages, also on held-out images). "timestep", "snr": times "t", their "value" and
            "objective_value". "gradient": as algorithm 2, but "similarity" holds cosines and "t" the starts of bins,
            plus the checkpoints' "steps". Denoiser "gaussian": noise levels "sigma" at even quantiles of the training
            density, the matrix "distance" of the network's outputs, "objective_value", "table" (the distance is the mean
            square from a stage's mean output) and "half_edges_sigma" (the edges from half the images)
            and "proposed_density" (mean and standard deviation of ln sigma, see `gaussian.propose_density`).
        diffusion: the training density and preconditioning of denoiser "gaussian"; else None.
        data_fingerprint: of the whole data set, held-out images included, or empty.
        codec: fingerprint of the codec whose latents were used, empty for pixels.
        scale: factor by which these latents were multiplied; None for pixels.
        strip: base64 PNG of the optimal denoiser's outputs on both sides of every edge (`edge_preview.edge_strip`), or
            empty.

    Raises:
        UserError: if the attributes are inconsistent.
    """

    edges_t: tuple[float, ...]
    edges_sigma: tuple[float, ...]
    schedule: NoiseSchedule
    time_measure: VP
    settings: StageSettings
    fingerprint: str
    intervals_t: tuple[tuple[float, float], ...]
    intervals_sigma: tuple[tuple[float, float], ...]
    samples: int
    float64_difference: float
    curves: dict[str, Any] = field(repr=False)
    data_fingerprint: str = ""
    codec: str = ""
    scale: float | None = None
    diffusion: DiffusionConfig | None = None
    strip: str = field(default="", repr=False)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        require_setting(
            self.format_version == FORMAT_VERSION,
            f"format_version={self.format_version}: this release reads format {FORMAT_VERSION}; find the stages again",
        )
        for name in ("edges_t", "edges_sigma", "intervals_t", "intervals_sigma"):
            edges, wanted = getattr(self, name), self.settings.stages - 1
            if name.startswith("intervals") and self.settings.algorithm in BASELINES:
                wanted = 0
            require_setting(
                len(edges) == wanted,
                f"{name}={list(edges)} must hold {wanted} edges for {self.settings.stages} stages",
            )
        self.stages()
        gaussian = self.settings.denoiser == "gaussian"
        require_setting(
            gaussian == (self.diffusion is not None),
            "diffusion is stored for denoiser gaussian, and for no other; find the stages again",
        )
        _check_curves(self.curves, "gaussian" if gaussian else self.settings.algorithm)

    @property
    def data_range(self) -> tuple[float, float] | None:
        """The data range, which sets the units of the sigma edges; None for latents."""
        return self.settings.data_range

    @property
    def rule(self) -> str:
        """The criterion for the edges: the rule (algorithm 1), the objective (algorithm 2), or the baseline's name."""
        algorithm = self.settings.algorithm
        if self.settings.denoiser == "gaussian":
            return "gaussian"
        if isinstance(algorithm, str):
            return algorithm
        return self.settings.rule if algorithm == 1 else self.settings.objective

    @property
    def boundary_ratios(self) -> tuple[float, ...]:
        """The edges as rectified-flow times sigma/(1 + sigma): `boundary_ratio` in diffusers' two-expert pipelines."""
        return tuple(sigma / (1.0 + sigma) for sigma in self.edges_sigma)

    def stages(self) -> Stages:
        """Return the stages; their origin: data range, time measure, rule, kernel, fingerprint, and the density if it counts."""
        density = {}
        if self.diffusion is not None:
            density = {
                "prior": serialization.to_dict(self.diffusion.prior),
                "precondition": self.diffusion.precondition,
            }
        origin = {
            **density,
            "data_range": self.data_range and list(self.data_range),
            "time_measure": serialization.to_dict(self.time_measure),
            "rule": self.rule,
            "kernel": serialization.to_dict(self.schedule),
            "fingerprint": self.fingerprint,
        }
        return Stages(self.edges_sigma, origin)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-serialisable data; `data_range` and `rule` are repeated at the top level."""
        data: dict[str, Any] = serialization.to_dict(self)
        return {**data, "data_range": self.data_range and list(self.data_range), "rule": self.rule}

    def save(self, path: Path | str) -> None:
        """Write the result as JSON, atomically."""
        files.write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> StageResult:
        """Read a saved result.

        Raises:
            UserError: if the file is missing, not JSON, incomplete or inconsistent; the message names the file and key.
        """
        data = serialization.read_json(Path(path))
        try:
            return cls._from_dict(data)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def _from_dict(cls, data: Any) -> StageResult:
        require_setting(
            isinstance(data, dict), "not a result of msdiff stages (expected a JSON object); find the stages again"
        )
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in data]
        missing += [name for name in _DERIVED if name not in data]
        require_setting(not missing, f"{', '.join(missing)} missing; find the stages again")
        result = serialization.from_dict(cls, {k: v for k, v in data.items() if k not in _DERIVED})
        if result.strip:
            decode_png(result.strip)
        for name in _DERIVED:
            require_setting(
                data[name] == result.to_dict()[name],
                f"{name}={data[name]!r} contradicts the settings ({result.to_dict()[name]!r}); find the stages again",
            )
        return result


def _check_curves(curves: dict[str, Any], kind: Algorithm | Literal["gaussian"]) -> None:
    """Raise UserError for curves that cannot be plotted."""
    names = _CURVES[kind]
    require_setting(set(curves) == set(names), f"curves must hold {', '.join(names)}, found {', '.join(curves)}")
    arrays = {}
    for name in set(names) - {"table"}:
        try:
            require_setting(
                _numbers(curves[name]), f"curves.{name} holds other than lists of numbers; find the stages again"
            )
            arrays[name] = np.asarray(curves[name], dtype=np.float64)
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"curves.{name} holds lists of numbers of different lengths; find the stages again"
            ) from None
    count = arrays[names[0]].size
    square = {"similarity": (count, count), "distance": (count, count)}
    shapes = {name: (count,) for name in arrays} | square | {"objective_value": ()}
    for name in ("steps", "half_edges_sigma", "proposed_density"):
        shapes[name] = np.shape(curves.get(name, ()))  # any length
    require_setting(all(arrays[n].shape == shapes[n] for n in arrays), "curves differ in length; find the stages again")
    table = curves.get("table", [])
    require_setting(
        isinstance(table, list) and all(isinstance(line, dict) and set(line) == set(_LINE) for line in table),
        f"lines of the table must hold {', '.join(sorted(_LINE))}; find the stages again",
    )
    for number, line in enumerate(table):
        check(line, _LINE, f"curves.table[{number}]", mend="; find the stages again")


def _numbers(value: Any) -> bool:
    """Return whether a value, or every value of nested lists, is a finite number or null."""
    if isinstance(value, list | tuple):
        return all(map(_numbers, value))
    return value is None or FINITE.fits(value)
