"""Stage finding on a data set."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .. import files
from ..config import CodecConfig, DataConfig, DiffusionConfig
from ..config.serialization import to_dict
from ..data import ImageData
from ..data.sources import open_configured
from ..errors import UserError
from ..latent.latents import LatentData
from ..performance.devices import joined
from ..progress import Progress
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from ..stage_finding import NoMiddleStageError, Sharing, StageResult, StageSettings, compute_stages
from .latent import latents_for_stages

GIB = 1 << 30


def find_stages(
    data: ImageData | str | DataConfig,
    settings: StageSettings | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    diffusion: DiffusionConfig | None = None,
    codec: CodecConfig | None = None,
    out: Path | str | None = None,
    device: str | None = None,
    memory: float = 2.0,
    image_shards: int = 1,
    progress: Progress | None = None,
) -> StageResult:
    """Find the stages of a data set's training images.

    Args:
        data: an opened data set (used whole), or its source (held-out images are left out; algorithm 2 uses them as a
            check).
        settings: algorithm and options.
        schedule: the kernel in whose time edges are printed; default VP.
        diffusion: training density and preconditioning for denoiser "gaussian"; None: those of EDM.
        codec: use the latents of this autoencoder instead of pixels.
        out: where to write the result as JSON, with its curves as PNG beside it.
        device: default CUDA when there is one.
        memory: approximate upper limit in GiB.
        image_shards: number of processes (of torchrun) in a group that divides the images. The groups divide the
            samples. Only the main process writes.
        progress: called with (done, total).

    Raises:
        UserError: if the data cannot be read or have no such stages, or processes differ in data or settings.
        RankLost: if another process is lost.
    """
    settings, (world, resolved) = settings or StageSettings(), joined(device, "stages")
    with world.report_failures():
        sharing = Sharing(world=world, image_shards=image_shards)
        images, held_out, whole = world.main_first(lambda: _opened(data))
        with world.synchronize_errors():
            kept: dict[str, Any] = {}
            found: ImageData | LatentData = images
            if codec is not None:
                found, kept = latents_for_stages(codec, images, resolved, progress)
                settings, held_out = dataclasses.replace(settings, data_range=None), None
        world.require_equal({"data": images.fingerprint, "image_shards": image_shards, **to_dict(settings)})
        try:
            result = compute_stages(
                found,
                settings,
                schedule=schedule or VP(),
                diffusion=diffusion,
                held_out=held_out,
                fingerprint=images.fingerprint,
                data_fingerprint=whole,
                device=resolved,
                memory=int(memory * GIB),
                sharing=sharing,
                progress=progress,
                **kept,
            )
        except NoMiddleStageError as error:
            if out is not None and world.is_main_process:
                raise UserError(f"{error} (curves: {save_overlap(error, Path(out))})") from None
            raise
        if out is not None and world.is_main_process:
            save_stages(result, Path(out))
        return result


def _opened(data: ImageData | str | DataConfig) -> tuple[ImageData, ImageData | None, str]:
    """Return the images to use, the held-out ones (None: there are none), and the fingerprint of the whole data set."""
    if isinstance(data, ImageData):
        return data, None, data.fingerprint
    config = DataConfig(source=data) if isinstance(data, str) else data
    whole = open_configured(config)
    training, others = whole.split(config.held_out)
    return training, others, whole.fingerprint


def save_stages(result: StageResult, path: Path) -> None:
    """Write a result as JSON, and its curves as PNG beside it."""
    from ..stage_finding.plots import plot_stages  # matplotlib takes a while to import

    result.save(path)
    plot_stages(result, path.with_suffix(".png"))


def curves_file(path: Path) -> Path:
    """Return where the curves of overlapping stages are written, beside the result's path."""
    return path.with_name(f"{path.stem}-curves.json")


def save_overlap(error: NoMiddleStageError, path: Path) -> str:
    """Write the curves of stages that overlap as JSON and PNG beside `path`; return the names of the files."""
    from ..stage_finding.plots import plot_overlap

    picture, curves = path.with_suffix(".png"), curves_file(path)
    files.write_json(curves, {"settings": to_dict(error.settings), "curves": error.curves})
    plot_overlap(error, picture)
    return f"{picture}, {curves}"
