"""Stage finding end to end: from images and settings to stage edges with their full provenance."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy.typing as npt
import torch

from ..config import DiffusionConfig
from ..errors import UserError
from ..progress import Progress
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from .baselines import baseline_partition
from .boundaries import OverlapError
from .edge_preview import edge_strip
from .edges import made_result
from .gaussian_stages import EDM_DENSITY, gaussian_stages
from .inputs import held_out_rows, row_shape, tiled_images
from .intervals import half_width
from .posterior import Images, TiledImages, as_images
from .result import StageResult
from .searching import Limits, Pairs, Search
from .settings import StageSettings, require_setting
from .sharing import Sharing


class NoMiddleStageError(UserError):
    """Algorithm 1 finds no middle stage. The message names what leaves one.

    Attributes:
        settings: of stage finding.
        curves: the mean similarities from which the edges would follow; see StageResult.curves.
    """

    def __init__(self, message: str, settings: StageSettings, curves: dict[str, Any], alpha: float | None) -> None:
        """Take the overlap's message, and the smallest alpha that leaves a middle stage."""
        mend = "no alpha leaves one" if alpha is None else f"the smallest alpha that leaves one is {alpha:g}"
        super().__init__(
            f"{message}; {mend}; denoiser gaussian always leaves one (msdiff stages DATA --denoiser gaussian)"
        )
        self.settings, self.curves = settings, curves


_FIRST = 200  # samples of the first round when `precision` is set


def compute_stages(
    images: Images | npt.NDArray[Any],
    settings: StageSettings | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    diffusion: DiffusionConfig | None = None,
    held_out: Images | npt.NDArray[Any] | None = None,
    fingerprint: str = "",
    data_fingerprint: str = "",
    codec: str = "",
    scale: float | None = None,
    device: torch.device | str | None = None,
    memory: int = 2 << 30,
    sharing: Sharing | None = None,
    progress: Progress | None = None,
) -> StageResult:
    """Find the stages of a data set with its optimal or Wiener denoiser (Algorithms 1 and 2).

    Args:
        images: (N, C, H, W), a tensor, an array, or rows (which may be larger than memory, as those of an ImageData):
            uint8, mapped from 0..255 onto settings.data_range, or floating point, already in this range.
        settings: of stage finding; None for the defaults.
        schedule: the kernel for the printed edges; None for VP. Averages over t are uniform in its time if it is a VP,
            else in the time of the standard VP.
        diffusion: training density and preconditioning for denoiser "gaussian"; None: those of EDM.
        held_out: other images (M, C, H, W), for comparing numbers of stages in algorithm 2.
        fingerprint: of the images, stored in the result.
        data_fingerprint: of the whole data set, held-out images included; stored, too.
        codec: fingerprint of the codec if the images are latents, stored in the result.
        scale: factor by which these latents were multiplied, stored in the result.
        device: of the computation; None: the images' device.
        memory: approximate memory budget in bytes.
        sharing: how several processes share the work; None: a single process.
        progress: called with (samples done, total samples).

    Raises:
        UserError: if the images are unusable (see the message), or no edges exist for these settings.
        NoMiddleStageError: if algorithm 1's outer stages overlap.
    """
    settings = (settings or StageSettings()).resolved()
    schedule, sharing = schedule or VP(), sharing or Sharing()
    measure = schedule if isinstance(schedule, VP) else VP()
    images = as_images(images)
    origin: dict[str, Any] = {
        "fingerprint": fingerprint,
        "data_fingerprint": data_fingerprint,
        "codec": codec,
        "scale": scale,
    }
    if settings.denoiser == "gaussian":
        report = progress or (lambda done, total: None)
        how: dict[str, Any] = {"schedule": schedule, "memory": memory, "progress": report, **origin}
        return gaussian_stages(images, settings, diffusion or EDM_DENSITY, **how)
    data, shape = tiled_images(images, settings, device, memory, sharing), row_shape(images)
    outside = None if held_out is None else held_out_rows(as_images(held_out), data, shape, settings)
    if settings.algorithm in ("timestep", "snr"):
        times, curves = baseline_partition(settings.algorithm, settings.stages, measure=measure)
        strip = _strip(data, shape, times, measure, settings)
        return made_result(times, curves, settings, schedule=schedule, measure=measure, strip=strip, **origin)
    require_setting(
        settings.algorithm != "gradient",
        "algorithm=gradient reads a trained run; see workflow.clustering",
    )
    search: Search = (Limits if settings.algorithm == 1 else Pairs)(data, settings, measure, sharing, progress)
    try:
        intervals = _sample(search, settings)
    except OverlapError as error:
        assert isinstance(search, Limits)
        raise NoMiddleStageError(str(error), settings, search.curves(), search.least_alpha()) from None
    times = search.edges()
    curves = search.curves()
    if isinstance(search, Pairs):
        curves["table"] = search.table(schedule, outside)
    return made_result(
        times,
        curves,
        settings,
        schedule=schedule,
        measure=measure,
        intervals=intervals,
        samples=search.samples,
        float64_difference=search.float64_difference(),
        strip=_strip(data, shape, times, measure, settings),
        **origin,
    )


def _strip(
    data: TiledImages,
    shape: tuple[int, ...],
    times: tuple[float, ...],
    measure: VP,
    settings: StageSettings,
) -> str:
    """Return the picture of the edges; an empty string if the data are not images with 1 or 3 channels."""
    if len(shape) != 3 or shape[0] not in (1, 3) or settings.data_range is None:
        return ""
    return edge_strip(data, (shape[0], shape[1], shape[2]), times, measure, settings.seed)


def _sample(search: Search, settings: StageSettings) -> list[tuple[float, float]]:
    """Draw samples until the edges have the requested precision; return the edges' intervals."""
    most, precision = settings.samples, settings.precision
    assert most is not None
    if precision is None:
        search.extend(most)
        return search.intervals()
    wanted = min(_FIRST, most)
    while True:
        search.extend(wanted)
        intervals = search.intervals()
        missing = search.sharing.agree(half_width(intervals) / precision)
        if missing <= 1:
            return intervals
        if wanted >= most:
            warnings.warn(
                f"the edges are known to ±{half_width(intervals):.4f} only after {most} samples, not to "
                f"±{precision}; raise samples",
                stacklevel=3,
            )
            return intervals
        # The error falls as 1/sqrt(samples). Estimates from few samples are unreliable, so the factor is at most 4.
        wanted = min(most, math.ceil(wanted * min(4.0, max(1.25, 1.1 * missing**2))))
