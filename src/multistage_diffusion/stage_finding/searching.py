"""Sampling and edge computation for algorithms 1 and 2, one Search class for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..memory import require_memory
from ..progress import Progress
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from .boundaries import ThreeStages, optimal_partition
from .edges import grid_times, stage_table
from .intervals import Array, edge_intervals
from .posterior import TiledImages, posterior_means_of
from .settings import StageSettings, require_setting
from .sharing import Sharing
from .similarity import (
    Similarities,
    agreement,
    draw,
    limit_similarities,
    outside_pairs,
    pair_similarities,
    sample_similarities,
)

_BINS = 100  # of the stored curves
_CHECKED = 64  # similarities of algorithm 1 that are also computed in float64
OUTSIDE = 64  # number of noisy held-out images


class Search(ABC):
    """The samples drawn so far and the edges computed from them."""

    def __init__(
        self, data: TiledImages, settings: StageSettings, measure: VP, sharing: Sharing, progress: Progress | None
    ) -> None:
        assert settings.space is not None
        self.data, self.settings, self.measure, self.sharing, self.progress = data, settings, measure, sharing, progress
        self.samples = 0
        self.how: dict[str, Any] = {
            "eta": settings.eta,
            "space": settings.space,
            "measure": measure,
            "seed": settings.seed,
        }

    def extend(self, samples: int) -> None:
        """Draw samples until there are `samples` of them.

        Raises:
            UserError: if memory cannot hold the results of so many samples.
        """
        require_memory(samples * self.sample_bytes(), f"samples={samples}", "draw fewer, or give --precision instead")
        numbers = range(self.samples, samples)
        done, progress = self.samples, self.progress
        groups = self.sharing.groups

        def report(mine: int, _: int) -> None:
            if progress is not None:
                progress(min(done + mine * groups, samples), samples)

        self.add(numbers, report)
        self.samples = samples

    @abstractmethod
    def sample_bytes(self) -> int:
        """Return the bytes stored per sample."""

    @abstractmethod
    def add(self, numbers: range, progress: Progress) -> None:
        """Draw the samples with these numbers."""

    @abstractmethod
    def edges(self, weights: Array | None = None) -> tuple[float, ...]:
        """Return the edges in the measure's time for sample weights (K,); None: all weights are 1."""

    @abstractmethod
    def curves(self) -> dict[str, Any]:
        """Return the data from which the edges are computed."""

    @abstractmethod
    def float64_difference(self) -> float:
        """Return the largest difference between some similarities and their float64 values."""

    def intervals(self) -> list[tuple[float, float]]:
        """Return the edges' 95 % intervals."""
        edges = self.edges()
        domain = self.measure.t_min, self.measure.t_max
        return edge_intervals(self.edges, self.samples, domain, seed=self.settings.seed, count=len(edges))


class Limits(Search):
    """Algorithm 1: similarity to the denoisers in the limits of zero and infinite noise."""

    found: Similarities | None = None
    _reader: ThreeStages | None = None

    def sample_bytes(self) -> int:
        """Return the bytes stored per sample: times, two similarities, and its bins of the curves."""
        return 3 * 8 * self.settings.times + 2 * 8 * _BINS

    def add(self, numbers: range, progress: Progress) -> None:
        """Draw the samples with these numbers."""
        mine = self.sharing.share(numbers)
        new = sample_similarities(self.data, mine, times=self.settings.times, progress=progress, **self.how)
        parts = [self.sharing.gather(values, numbers) for values in new]
        if self.found is not None:
            parts = [torch.cat(pair) for pair in zip(self.found, parts, strict=True)]
        self.found, self._reader = Similarities(*parts), None

    def edges(self, weights: Array | None = None) -> tuple[float, ...]:
        """Return t1 and t2."""
        if self._reader is None:
            assert self.found is not None
            s = self.settings
            domain = self.measure.t_min, self.measure.t_max
            self._reader = ThreeStages(self.found, alpha=s.alpha, rule=s.rule, grid=s.grid, domain=domain)
        return self._reader.edges(None if weights is None else torch.from_numpy(weights))

    def least_alpha(self) -> float | None:
        """Return the smallest alpha above that of the settings with three stages; None: there is none."""
        assert self._reader is not None
        return self._reader.least_alpha()

    def curves(self) -> dict[str, Any]:
        """Return means over equal bins of t with their standard errors; bins without samples are omitted."""
        assert self.found is not None
        low, high = self.measure.t_min, self.measure.t_max
        t, s0, s1 = (values.numpy() for values in self.found)
        bins = np.minimum(((t - low) / (high - low) * _BINS).astype(np.int64), _BINS - 1)
        count = np.bincount(bins.ravel(), minlength=_BINS)
        full = count > 0
        curves = {"t": low + (np.arange(_BINS)[full] + 0.5) / _BINS * (high - low)}
        for name, values in (("s0", s0), ("s1", s1)):
            mean, error = _binned(bins, values, count)
            curves |= {name: mean[full], f"{name}_error": error[full]}
        return {name: np.round(v, 6).tolist() for name, v in curves.items()}

    def float64_difference(self) -> float:
        """Return the largest difference between some similarities and their float64 values."""
        assert self.found is not None
        times = self.settings.times
        rows = torch.arange(min(self.samples, max(1, _CHECKED // times)), device=self.data.device)
        own, noise = draw(self.data, rows, self.settings.seed)
        sigma = self.measure.sigma(self.found.t[: len(rows)].T.to(self.data.device))
        eta, space = self.settings.eta, self.settings.space
        assert space is not None
        fast = limit_similarities(self.data, own, noise, sigma, eta=eta, space=space)
        y = self.data.rows(own).double()
        x = (y + sigma[:, :, None] * noise.double()).flatten(0, 1)
        mean = posterior_means_of(self.data, x, sigma.flatten()).reshape(*sigma.shape, -1)
        bound = (eta * sigma if space == "eps" else torch.full_like(sigma, eta))[:, :, None]
        exact = agreement(mean - y, bound), agreement(mean, bound)
        return max(float((a - b).abs().max()) for a, b in zip(fast, exact, strict=True))


def _binned(bins: npt.NDArray[np.int64], values: Array, count: npt.NDArray[np.int64]) -> tuple[Array, Array]:
    """Return bin means and their standard errors; the values of one sample (a row) in one bin count as one draw."""
    samples = len(values)
    cells = (np.arange(samples)[:, None] * len(count) + bins).ravel()
    sums = np.bincount(cells, values.ravel(), samples * len(count)).reshape(samples, -1)
    sizes = np.bincount(cells, minlength=samples * len(count)).reshape(samples, -1)
    total = np.maximum(count, 1)
    mean = sums.sum(0) / total
    residual = sums - sizes * mean  # standard error of a ratio estimator
    return mean, np.sqrt((residual**2).sum(0)) / total


class Pairs(Search):
    """Algorithm 2: similarity of all pairs of times of a grid, which is divided into groups."""

    found: Tensor | None = None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.nodes = grid_times(self.measure, self.settings.nodes)
        require_setting(
            self.measure.t_min > 0,
            "schedule.t_min=0: algorithm 2 compares the denoiser at t_min with others, and without noise there is none; "
            "give a t_min above 0, e.g. 0.001",
        )
        require_setting(
            self.settings.stages <= len(self.nodes),
            f"stages={self.settings.stages} is more than the {len(self.nodes)} times of the grid",
        )

    def add(self, numbers: range, progress: Progress) -> None:
        """Draw the samples with these numbers."""
        mine = self.sharing.share(numbers)
        new = pair_similarities(self.data, self.nodes, mine, progress=progress, **self.how)
        new = self.sharing.gather(new, numbers)
        self.found = new if self.found is None else torch.cat((self.found, new))

    def sample_bytes(self) -> int:
        """Return the bytes stored per sample: a matrix (M, M)."""
        return 4 * len(self.nodes) ** 2

    def matrix(self, weights: Array | None = None) -> Array:
        """Return the mean similarity of all pairs of times, (M, M)."""
        assert self.found is not None
        counts = torch.ones(self.samples) if weights is None else torch.from_numpy(weights).float()
        mean: Array = (torch.tensordot(counts, self.found, 1).double() / counts.sum()).numpy()
        return mean

    def edges(self, weights: Array | None = None) -> tuple[float, ...]:
        """Return the times of the edges."""
        first, _ = optimal_partition(self.matrix(weights), self.settings.stages, self.settings.objective)
        return self.times(first)

    def times(self, first: tuple[int, ...]) -> tuple[float, ...]:
        """Return the times of the nodes with these indices."""
        return tuple(float(self.nodes[i]) for i in first)

    def curves(self) -> dict[str, Any]:
        """Return the grid, the mean similarity of all pairs of its times, the objective's value and an empty table."""
        matrix = self.matrix()
        _, value = optimal_partition(matrix, self.settings.stages, self.settings.objective)
        return {
            "t": self.nodes.tolist(),
            "similarity": np.round(matrix, 6).tolist(),
            "objective_value": value,
            "table": [],
        }

    def table(self, schedule: NoiseSchedule, held_out: Tensor | None) -> list[dict[str, Any]]:
        """Return edges and mean distance within a stage for 1 to 8 stages, also on held-out images."""
        matrix, outside = self.matrix(), None
        if held_out is not None:
            rows = min(OUTSIDE, self.samples)
            outside = outside_pairs(self.data, held_out, self.nodes, rows, **self.how).double().mean(0).numpy()
        return stage_table(matrix, self.nodes.tolist(), self.settings.objective, schedule, self.measure, outside)

    def float64_difference(self) -> float:
        """Return the largest difference between some similarities and their float64 values."""
        assert self.found is not None
        rows = torch.arange(2, device=self.data.device)
        own, _ = draw(self.data, rows, self.settings.seed)
        y = self.data.rows(own).double()
        exact = outside_pairs(self.data, y, self.nodes, len(y), numbered=True, **self.how)
        return float((exact - self.found[: len(y)]).abs().max())
