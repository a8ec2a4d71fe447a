"""Edges in the requested kernel, and the table for choosing the number of stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from .boundaries import Objective, mean_within_distance, optimal_partitions
from .intervals import Array
from .result import StageResult
from .settings import NODES, StageSettings

MOST_STAGES = 8  # in the table


def made_result(
    times: tuple[float, ...],
    curves: dict[str, Any],
    settings: StageSettings,
    *,
    schedule: NoiseSchedule,
    measure: VP,
    intervals: Sequence[tuple[float, float]] = (),
    **other: Any,
) -> StageResult:
    """Return the result of stage finding.

    Args:
        times: edges in the time of `measure`.
        curves: the data from which the edges were computed.
        settings: the settings used.
        schedule: the kernel for the printed edges.
        measure: the kernel of `times` and `curves`.
        intervals: confidence intervals of the edges, in the time of `measure`.
        other: further attributes of the result.

    Raises:
        UserError: if an edge lies outside the schedule's steps.
    """
    edges, sigmas = printed(schedule, measure, times)
    bounds = tuple((*in_time_of(schedule, measure, pair),) for pair in intervals)
    return StageResult(
        edges_t=edges,
        edges_sigma=sigmas,
        intervals_t=bounds,  # type: ignore[arg-type]
        intervals_sigma=tuple((measure.edge_sigma(low), measure.edge_sigma(high)) for low, high in intervals),
        schedule=schedule,
        time_measure=measure,
        settings=settings,
        curves=curves,
        **{"samples": 0, "float64_difference": 0.0, **other},
    )


def in_time_of(schedule: NoiseSchedule, measure: VP, times: tuple[float, ...]) -> tuple[float, ...]:
    """Convert times of `measure` to times of `schedule` with the same sigma."""
    return times if schedule == measure else tuple(schedule.edge_time(measure.edge_sigma(t)) for t in times)


def printed(
    schedule: NoiseSchedule, measure: VP, times: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return edges in the time of `schedule` and as sigmas; raise UserError for an edge outside its steps."""
    edges = in_time_of(schedule, measure, times)
    try:
        return edges, tuple(schedule.edge_sigma(t) for t in edges)
    except UserError:
        found = ", ".join(f"{measure.edge_sigma(t):.4g}" for t in times)
        raise UserError(
            f"stages: edges at sigma = {found}: the {schedule.kind} schedule has steps on one side only of one of them; "
            "print them in another schedule, or ask for other stages"
        ) from None


def stage_table(
    matrix: Array,
    nodes: list[float],
    objective: Objective,
    schedule: NoiseSchedule,
    measure: VP,
    outside: Array | None = None,
) -> list[dict[str, Any]]:
    """Return edges and mean distance within a stage for 1 to 8 stages, also for the held-out similarity `outside`."""
    found = optimal_partitions(matrix, min(MOST_STAGES, len(nodes)), objective)
    return table_lines(
        (
            (
                tuple(nodes[i] for i in first),
                mean_within_distance(matrix, first),
                None if outside is None else mean_within_distance(outside, first),
            )
            for first, _ in found
        ),
        schedule,
        measure,
    )


def table_lines(
    found: Iterable[tuple[tuple[float, ...], float, float | None]], schedule: NoiseSchedule, measure: VP
) -> list[dict[str, Any]]:
    """Return the lines of a table from (edges in the time of `measure`, distance, distance on held-out images).

    A line is left out if the schedule cannot represent its edges.
    """
    lines: list[dict[str, Any]] = []
    for times, distance, outside in found:
        try:
            edges_t, edges_sigma = printed(schedule, measure, times)
        except UserError:
            continue
        lines.append(
            {
                "stages": len(times) + 1,
                "edges_t": list(edges_t),
                "edges_sigma": list(edges_sigma),
                "distance": distance,
                "distance_held_out": outside,
            }
        )
    return lines


def grid_times(measure: VP, nodes: int = NODES) -> Tensor:
    """Return Algorithm 2's grid, which divides t_max into nodes - 1 parts: t_min, t_min + t_max / (nodes - 1), ... and t_max.

    For VP and 41 nodes 0.001, 0.026, ..., 0.976, 1; for 21, the published grid, 0.001, 0.051, ..., 0.951, 1.
    """
    inner = measure.t_min + np.arange(nodes - 1) * measure.t_max / (nodes - 1)
    return torch.from_numpy(np.round(np.append(inner[inner < measure.t_max], measure.t_max), 9))
