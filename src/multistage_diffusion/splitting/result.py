"""Splitting from end to end: images and settings in, stage edges with everything that decided them out."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import serialization
from ..optimal import OptimalDenoiser
from ..schedules import VP, NoiseSchedule
from ..stages import Stages
from .boundaries import Objective, Rule, optimal_partition, three_stage_edges
from .similarity import Progress, Similarities, Space, sample_similarities, similarity_matrix

FORMAT_VERSION = 1
_BINS = 200  # of the stored curves
_NODE_SPACING = 0.025  # of Algorithm 2's grid, as a share of t_max
_CURVES = {1: ("t", "s0", "s1"), 2: ("t", "similarity", "objective_value")}
_DERIVED = ("data_range", "rule")  # top-level copies of what the settings hold


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"split: {message}")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How stages are looked for.

    Attributes:
        algorithm: 1 (three stages, by similarity to the two limits) or 2 (any number, by clustering).
        stages: the number n of stages; 3 for algorithm 1.
        samples: K noisy images. None: 50,000 for algorithm 1 (as published); 2,000 for algorithm 2, where each sample
            is compared at all 820 pairs of times.
        eta: largest difference of a coordinate that counts as agreement, in the units of `space`.
        alpha: similarity that the outer stages keep (algorithm 1).
        rule: "interval-mean" (published) or "pointwise"; see `boundaries.three_stage_edges` (algorithm 1).
        space: what is compared: "eps" (noise predictions; blind to a common scale of data and sigma) or "x0"
            (posterior means, in units of the data). None: "eps" for algorithm 1 and "x0" for algorithm 2, as published.
        objective: "total-distance" (eq. 21) or "mean-similarity" (the published run; a group of one time scores the
            full 1, so it may cut off single times); see `boundaries.optimal_partition` (algorithm 2).
        data_range: (low, high) onto which images are mapped: the range the network trains on, in whose units the sigma
            edges are. The published edges are for (0, 1).
        seed: decides the samples.
        grid: number of times at which algorithm 1 looks for edges.

    Raises:
        ValueError: naming the field and the value.
    """

    algorithm: Literal[1, 2] = 1
    stages: int = 3
    samples: int | None = None
    eta: float = 2 / 256
    alpha: float = 0.9
    rule: Rule = "interval-mean"
    space: Space | None = None
    objective: Objective = "total-distance"
    data_range: tuple[float, float] = (-1.0, 1.0)
    seed: int = 0
    grid: int = 10_000

    def __post_init__(self) -> None:
        _require(self.algorithm in (1, 2), f"algorithm={self.algorithm} must be 1 or 2")
        _require(self.stages >= 1, f"stages={self.stages} must be at least 1")
        _require(
            self.algorithm == 2 or self.stages == 3,
            f"stages={self.stages}: algorithm 1 finds three stages; use algorithm 2 for another number",
        )
        _require(
            self.samples is None or self.samples >= 100, f"samples={self.samples} must be at least 100, to average over"
        )
        _require(0 < self.eta < math.inf, f"eta={self.eta} must be positive and finite")
        _require(0 < self.alpha <= 1, f"alpha={self.alpha} must be in (0, 1]")
        for name, known in (
            ("rule", ("interval-mean", "pointwise")),
            ("space", (None, "eps", "x0")),
            ("objective", ("total-distance", "mean-similarity")),
        ):
            _require(getattr(self, name) in known, f"{name}={getattr(self, name)!r} must be one of {known}")
        low, high = self.data_range
        _require(-math.inf < low < high < math.inf, f"data_range={self.data_range} must be finite and ascending")
        _require(self.grid >= 10, f"grid={self.grid} must be at least 10")

    def resolved(self) -> SplitSettings:
        """Return a copy with the algorithm's own defaults filled in for `samples` and `space`."""
        first = self.algorithm == 1
        samples, space = self.samples or (50_000 if first else 2_000), self.space or ("eps" if first else "x0")
        return dataclasses.replace(self, samples=samples, space=space)


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """Stage edges and what decided them.

    Attributes:
        edges_t: the n - 1 interior edges, ascending, in the time of `schedule`.
        edges_sigma: the same as noise-to-signal ratios, in units of `data_range`.
        schedule: the kernel in which `edges_t` are printed.
        time_measure: the kernel in whose time averages over t are uniform; `curves` are in this time.
        settings: as used, defaults filled in.
        fingerprint: of the data set, or empty.
        curves: algorithm 1: binned "t" with the means "s0" and "s1"; algorithm 2: nodes "t", the matrix "similarity"
            and "objective_value". Plain lists and numbers.

    Raises:
        ValueError: if the parts do not fit together.
    """

    edges_t: tuple[float, ...]
    edges_sigma: tuple[float, ...]
    schedule: NoiseSchedule
    time_measure: VP
    settings: SplitSettings
    fingerprint: str
    curves: dict[str, Any] = field(repr=False)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _require(
            self.format_version == FORMAT_VERSION,
            f"format_version={self.format_version}: this release reads format {FORMAT_VERSION}; run the split again",
        )
        for name in ("edges_t", "edges_sigma"):
            edges = getattr(self, name)
            _require(
                len(edges) == self.settings.stages - 1,
                f"{name}={list(edges)} must hold {self.settings.stages - 1} edges for {self.settings.stages} stages",
            )
        self.stages()
        _check_curves(self.curves, self.settings.algorithm)

    @property
    def data_range(self) -> tuple[float, float]:
        """The range of the data in whose units the sigma edges are."""
        return self.settings.data_range

    @property
    def rule(self) -> str:
        """The rule (algorithm 1) or objective (algorithm 2) that set the edges."""
        return self.settings.rule if self.settings.algorithm == 1 else self.settings.objective

    def stages(self) -> Stages:
        """Return the stages, with data range, time measure, rule, kernel and fingerprint as their origin."""
        origin = {
            "data_range": list(self.data_range),
            "time_measure": serialization.to_dict(self.time_measure),
            "rule": self.rule,
            "kernel": serialization.to_dict(self.schedule),
            "fingerprint": self.fingerprint,
        }
        return Stages(self.edges_sigma, origin)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able data; `data_range` and `rule` are repeated at the top level."""
        data: dict[str, Any] = serialization.to_dict(self)
        return {**data, "data_range": list(self.data_range), "rule": self.rule}

    def save(self, path: Path | str) -> None:
        """Write the result as JSON, atomically."""
        serialization.write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> SplitResult:
        """Read a saved result.

        Raises:
            ValueError: naming the file and the key, if it is missing, not JSON, incomplete or inconsistent.
        """
        data = serialization.read_json(Path(path))
        try:
            return cls._from_dict(data)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    @classmethod
    def _from_dict(cls, data: Any) -> SplitResult:
        _require(isinstance(data, dict), "not the result of a split (expected a JSON object); run the split again")
        missing = [f.name for f in dataclasses.fields(cls) if f.name not in data]
        missing += [name for name in _DERIVED if name not in data]
        _require(not missing, f"{', '.join(missing)} missing; run the split again")
        result = serialization.from_dict(cls, {k: v for k, v in data.items() if k not in _DERIVED})
        for name in _DERIVED:
            _require(
                data[name] == result.to_dict()[name],
                f"{name}={data[name]!r} contradicts the settings ({result.to_dict()[name]!r}); run the split again",
            )
        return result


def _check_curves(curves: dict[str, Any], algorithm: int) -> None:
    """Refuse curves that a plot could not draw."""
    names = _CURVES[algorithm]
    _require(set(curves) == set(names), f"curves must hold {', '.join(names)}, found {', '.join(curves)}")
    try:
        arrays = {name: np.asarray(curves[name], dtype=np.float64) for name in names}
    except (TypeError, ValueError):
        raise ValueError("split: curves hold something other than lists of numbers; run the split again") from None
    count = arrays["t"].size
    shapes = [(count,)] * 3 if algorithm == 1 else [(count,), (count, count), ()]
    _require([arrays[name].shape for name in names] == shapes, "curves differ in length; run the split again")


def find_stages(
    images: Tensor | npt.NDArray[Any],
    settings: SplitSettings | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    fingerprint: str = "",
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> SplitResult:
    """Find the stages of a data set with its optimal denoiser (Algorithms 1 and 2).

    Args:
        images: (N, C, H, W): uint8, mapped from 0..255 onto settings.data_range, or floating point, already in it.
        settings: how to look; None for the defaults.
        schedule: the kernel in whose time the edges are printed; None for VP. Averages over t are uniform in its time
            if it is a VP, else in that of the standard VP.
        fingerprint: of the data set, kept in the result.
        device: where to compute; None: where the images are.
        progress: called with (samples done, samples in all).

    Raises:
        ValueError: if the images are unusable (see the message), or no edges exist for these settings.
    """
    settings = (settings or SplitSettings()).resolved()
    schedule = schedule or VP()
    measure = schedule if isinstance(schedule, VP) else VP()
    denoiser = OptimalDenoiser(_as_data(images, settings.data_range, device))
    split = _algorithm_1 if settings.algorithm == 1 else _algorithm_2
    times, curves = split(denoiser, settings, measure, progress)
    if schedule != measure:
        times = tuple(schedule.edge_time(measure.edge_sigma(t)) for t in times)
    return SplitResult(
        edges_t=times,
        edges_sigma=tuple(schedule.edge_sigma(t) for t in times),
        schedule=schedule,
        time_measure=measure,
        settings=settings,
        fingerprint=fingerprint,
        curves=curves,
    )


def _as_data(
    images: Tensor | npt.NDArray[Any], data_range: tuple[float, float], device: torch.device | str | None
) -> Tensor:
    """Return images as float32 in data_range, checked."""
    data = torch.as_tensor(np.array(images) if isinstance(images, np.ndarray) else images, device=device)
    low, high = data_range
    _require(data.ndim >= 2 and data.numel() > 0, f"images.shape={tuple(data.shape)} must be (N, C, H, W), not empty")
    if data.dtype == torch.uint8:
        data = torch.add(data.to(torch.float32).mul_((high - low) / 255.0), low)
    else:
        _require(data.is_floating_point(), f"images.dtype={data.dtype} must be uint8 or floating point")
        data = data.to(torch.float32)
        _require(bool(torch.isfinite(data).all()), "images hold NaN or infinite values; remove those images")
        found = float(data.min()), float(data.max())
        slack = 1e-4 * (high - low)
        _require(
            low - slack <= found[0] and found[1] <= high + slack,
            f"images have values from {found[0]:.4g} to {found[1]:.4g}, outside data_range=({low:g}, {high:g}); pass "
            "the range the network trains on",
        )
    _require(
        not bool((data == data[:1]).all()),
        f"all {len(data)} images are the same, so the optimal denoiser is the same at every noise level; give at least "
        "two different images",
    )
    return data


def _algorithm_1(
    denoiser: OptimalDenoiser, settings: SplitSettings, measure: VP, progress: Progress | None
) -> tuple[tuple[float, ...], dict[str, Any]]:
    assert settings.samples is not None
    assert settings.space is not None
    similarities = sample_similarities(
        denoiser,
        samples=settings.samples,
        eta=settings.eta,
        space=settings.space,
        measure=measure,
        seed=settings.seed,
        progress=progress,
    )
    domain = measure.t_min, measure.t_max
    edges = three_stage_edges(similarities, alpha=settings.alpha, rule=settings.rule, grid=settings.grid, domain=domain)
    return edges, _binned(similarities, domain)


def _binned(similarities: Similarities, domain: tuple[float, float]) -> dict[str, Any]:
    """Return the curves as means over equal bins of t; bins without samples are left out."""
    t, s0, s1 = (values.numpy() for values in similarities)
    position = (t - domain[0]) / (domain[1] - domain[0])
    bins = np.minimum((position * _BINS).astype(np.int64), _BINS - 1)
    count = np.bincount(bins, minlength=_BINS)
    full = count > 0
    centres = domain[0] + (np.arange(_BINS) + 0.5) / _BINS * (domain[1] - domain[0])
    means = {name: np.bincount(bins, v, _BINS)[full] / count[full] for name, v in (("s0", s0), ("s1", s1))}
    return {name: np.round(v, 6).tolist() for name, v in {"t": centres[full], **means}.items()}


def _algorithm_2(
    denoiser: OptimalDenoiser, settings: SplitSettings, measure: VP, progress: Progress | None
) -> tuple[tuple[float, ...], dict[str, Any]]:
    assert settings.samples is not None
    assert settings.space is not None
    nodes = _nodes(measure)
    _require(settings.stages <= len(nodes), f"stages={settings.stages} is more than the {len(nodes)} times of the grid")
    matrix = similarity_matrix(
        denoiser,
        nodes,
        samples=settings.samples,
        eta=settings.eta,
        space=settings.space,
        measure=measure,
        seed=settings.seed,
        progress=progress,
    ).numpy()
    first, value = optimal_partition(matrix, settings.stages, settings.objective)
    times = nodes.tolist()
    curves = {"t": times, "similarity": np.round(matrix, 6).tolist(), "objective_value": value}
    return tuple(times[i] for i in first), curves


def _nodes(measure: VP) -> Tensor:
    """Return Algorithm 2's grid: t_min, t_min + 0.025 t_max, ... and t_max (0.001, 0.026, ..., 0.976, 1 for VP)."""
    inner = np.arange(measure.t_min, measure.t_max, _NODE_SPACING * measure.t_max)
    return torch.from_numpy(np.round(np.append(inner, measure.t_max), 9))
