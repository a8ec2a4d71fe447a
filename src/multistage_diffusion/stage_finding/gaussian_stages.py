"""Stage finding with the Wiener denoiser end to end: from images and settings to edges with their provenance."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import DiffusionConfig
from ..data.rows import read
from ..errors import UserError
from ..preconditioning import make_preconditioning
from ..progress import Progress, interruptible
from ..schedules import LogNormal, NoiseSchedule
from ..schedules.vp import VP
from .edge_preview import edge_strip
from .edges import MOST_STAGES, made_result, table_lines
from .gaussian import (
    RESAMPLES,
    Moments,
    Output,
    Spectrum,
    bootstrap_edges,
    cluster,
    density_levels,
    edges_between,
    gaussian_edges,
    measure_moments,
    output_distances,
    propose_density,
)
from .inputs import check_kind, check_values, row_shape
from .intervals import LEVEL
from .posterior import Images, TiledImages
from .result import StageResult
from .settings import StageSettings, require_setting
from .wiener import WienerDenoiser

STORED = 100  # noise levels of the stored curves
_PREVIEW = 512  # images of the picture's Wiener denoiser
_BYTES = 16  # per value of an image: its copy, and float64 columns
EDM_DENSITY = DiffusionConfig(precondition="edm", prior=LogNormal(p_mean=-1.2, p_std=1.2))


def gaussian_stages(
    images: Images,
    settings: StageSettings,
    diffusion: DiffusionConfig,
    *,
    schedule: NoiseSchedule,
    memory: int,
    progress: Progress,
    **origin: Any,
) -> StageResult:
    """Find the stages by the Wiener denoiser of at most settings.samples images, drawn at random.

    Args:
        images: rows (C, H, W), uint8 or floating point.
        settings: of stage finding, complete.
        diffusion: training density and preconditioning. For "edm", the images' own standard deviation about their mean
            replaces sigma_data.
        schedule: the kernel of the printed edges.
        memory: approximate budget in bytes; it bounds the number of images.
        progress: called with (edges found, total) of the bootstrap.
        origin: fingerprint, codec and scale, stored in the result.

    Raises:
        UserError: if the images are unusable, or there are fewer noise levels than stages.
    """
    check_kind("images", images, settings)
    check_values("images", images, settings)
    assert settings.samples is not None
    dim = math.prod(row_shape(images))
    count = min(settings.samples, len(images), max(16, memory // (_BYTES * dim)))
    numbers = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed))[:count]
    rows = read(images, numbers)
    scale, shift = _scaling(rows, settings)
    moments = interruptible(lambda: measure_moments(rows, scale=scale, shift=shift))
    spectrum = moments.spectrum()
    if diffusion.precondition == "edm":
        diffusion = dataclasses.replace(diffusion, sigma_data=spectrum.sigma_data)
    proposed = _proposed(spectrum, scale if rows.dtype == torch.uint8 else 0.0, settings)
    if settings.density == "auto" and proposed is not None:
        diffusion = dataclasses.replace(diffusion, prior=proposed)
    preconditioning = make_preconditioning(diffusion)

    def output(sigma: Tensor) -> tuple[Tensor, Tensor]:
        c = preconditioning.coefficients(sigma)
        return c.skip, c.out

    sigma = density_levels(diffusion.prior)
    distances = output_distances(spectrum, sigma, output)
    found = cluster(distances, max(min(MOST_STAGES, len(sigma)), settings.stages))
    first, value = found[settings.stages - 1]
    measure = schedule if isinstance(schedule, VP) else VP()
    times = _times(measure, edges_between(sigma, first))
    half = interruptible(lambda: measure_moments(rows[: max(16, count // 2)], scale=scale, shift=shift)).spectrum()
    stored = np.linspace(0, len(sigma) - 1, min(STORED, len(sigma))).round().astype(int)
    return made_result(
        times,
        {
            "sigma": sigma[stored].tolist(),
            "distance": [[float(f"{v:.6g}") for v in row] for row in distances[stored][:, stored].tolist()],
            "objective_value": value,
            "table": table_lines(
                (
                    (_times(measure, edges_between(sigma, cuts)), cost / (2 * len(sigma)), None)
                    for cuts, cost in found[:MOST_STAGES]
                ),
                schedule,
                measure,
            ),
            "proposed_density": [] if proposed is None else [proposed.p_mean, proposed.p_std],
            "half_edges_sigma": list(gaussian_edges(half, diffusion.prior, output, settings.stages)),
        },
        settings,
        schedule=schedule,
        measure=measure,
        intervals=_intervals(moments, diffusion, output, settings, measure, progress),
        samples=count,
        diffusion=diffusion,
        strip=_strip(rows, scale, shift, times, measure, settings),
        **origin,
    )


def _proposed(spectrum: Spectrum, quantum: float, settings: StageSettings) -> LogNormal | None:
    """Return the density that the images propose; None if they propose none and none is needed."""
    try:
        return propose_density(spectrum.binned(), quantum)
    except UserError:
        if settings.density == "auto":
            raise
        return None


def _scaling(rows: Tensor, settings: StageSettings) -> tuple[float, float]:
    """Return the factor and offset that map rows to the network's range; floats are in it already."""
    if rows.dtype != torch.uint8:
        return 1.0, 0.0
    require_setting(settings.data_range is not None, "data_range=None is for floats; uint8 pixels need a range")
    assert settings.data_range is not None
    low, high = settings.data_range
    return (high - low) / 255.0, low


def _times(measure: VP, edges: Sequence[float]) -> tuple[float, ...]:
    return tuple(float(t) for t in measure.time(torch.tensor(edges, dtype=torch.float64)))


def _intervals(
    moments: Moments,
    diffusion: DiffusionConfig,
    output: Output,
    settings: StageSettings,
    measure: VP,
    progress: Progress,
) -> list[tuple[float, float]]:
    """Return the 95 % interval of every edge over resamples of the images, in the time of the measure."""
    if settings.stages == 1:
        return []
    edges = bootstrap_edges(
        moments, diffusion.prior, output, settings.stages, seed=settings.seed, resamples=RESAMPLES, progress=progress
    )
    levels = density_levels(diffusion.prior).numpy()
    low, high = (np.quantile(edges, share, axis=0) for share in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    # an edge is known to the noise levels beside it
    below, above = levels[np.searchsorted(levels, low) - 1], levels[np.searchsorted(levels, high)]
    return list(zip(_times(measure, below.tolist()), _times(measure, above.tolist()), strict=True))


def _strip(
    rows: Tensor, scale: float, shift: float, cuts: tuple[float, ...], measure: VP, settings: StageSettings
) -> str:
    """Return the picture of the Wiener denoiser's answers; an empty string for data that are not grey or colour images."""
    shape = tuple(rows.shape[1:])
    if len(shape) != 3 or shape[0] not in (1, 3) or settings.data_range is None:
        return ""
    some = rows[:_PREVIEW]
    denoiser = WienerDenoiser(some.to(torch.float64) * scale + shift)
    data = TiledImages(some, settings.data_range)
    return edge_strip(data, (shape[0], shape[1], shape[2]), cuts, measure, settings.seed, denoiser)
