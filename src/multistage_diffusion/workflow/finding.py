"""Finding the stages of a data set."""

from __future__ import annotations

from pathlib import Path

from ..config import DataConfig
from ..data import ImageData, open_configured
from ..schedules import VP, NoiseSchedule
from ..splitting import SplitResult, SplitSettings, find_stages
from ..training.devices import resolve_device
from .progress import Progress


def split(
    data: ImageData | str | DataConfig,
    settings: SplitSettings | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    out: Path | str | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> SplitResult:
    """Find the stages of a data set's training images.

    Args:
        data: an opened data set (used whole), or where it is (its held-out images are left out).
        settings: algorithm and options.
        schedule: the kernel in whose time edges are printed; default VP.
        out: where to write the result as JSON, with its curves as PNG beside it.
        device: default CUDA when there is one.
        progress: called with (done, total).

    Raises:
        ValueError: if the data cannot be read or have no such stages.
    """
    if not isinstance(data, ImageData):
        config = DataConfig(source=data) if isinstance(data, str) else data
        data, _ = open_configured(config).split(config.held_out)
    result = find_stages(
        data.images,
        settings or SplitSettings(),
        schedule=schedule or VP(),
        fingerprint=data.fingerprint,
        device=resolve_device(device),
        progress=progress,
    )
    if out is not None:
        save_split(result, Path(out))
    return result


def save_split(result: SplitResult, path: Path) -> None:
    """Write a split as JSON, and its curves as PNG beside it."""
    from ..splitting.plots import plot_split  # matplotlib takes a while to import

    result.save(path)
    plot_split(result, path.with_suffix(".png"))
