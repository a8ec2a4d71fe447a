"""Sampling of images in batches; the noise of a sample depends on its number, not on its batch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..config import SamplingConfig
from ..config.sampling import SOLVERS
from ..contracts import Conditioning, Denoiser
from ..data import to_uint8
from ..distributed import ALONE, World
from ..errors import UserError
from ..progress import Progress
from ..schedules import NoiseSchedule
from .guidance import Clipped, Guided, Thresholded
from .plan import make_plan
from .trajectories import sample, start_noise, step_noise


@torch.no_grad()
def sample_images(
    denoiser: Denoiser,
    shape: tuple[int, ...],
    count: int,
    *,
    config: SamplingConfig,
    schedule: NoiseSchedule,
    seed: int = 0,
    batch: int = 256,
    labels: Tensor | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
    autocast: torch.dtype | None = None,
    finished: Callable[[int, Tensor], object] | None = None,
    world: World = ALONE,
) -> Tensor:
    """Draw samples 0 .. count-1 of a seed.

    Args:
        denoiser: any Denoiser.
        shape: (C, H, W) of one image or latent that the denoiser computes.
        count: number of samples.
        config: solver, calls and guidance (weights other than 0 and 1 double the rows of each call).
        schedule: of the run; gives the default range and the time of spacing "time".
        seed: determines the noise, together with the sample number.
        batch: samples per batch; affects speed and memory, not the noise of any sample.
        labels: int64 (count,) class labels, or None.
        device: of the computation.
        progress: called with (samples done, total) of this process after each call; of a batch in part, as its calls are done.
        decode: maps end states to images in [-1, 1] on the device, e.g. a codec's decoder; None: end states are images.
        autocast: autocast dtype of the denoiser; the trajectory's state stays float32. None: no autocast.
        finished: called with (number of the first sample, images) of each batch, in another thread while the next batch
            is drawn. With several processes it is called once, with all images, on the main process.
        world: all its processes must make this call; each draws its share and gets all images.

    Returns:
        uint8 images (count, C, H, W) on the CPU.

    Raises:
        UserError: if count or batch is not positive, the sampler's settings are invalid, config.guidance is not 1 and
            there are no labels, or config.threshold is set and end states are decoded.
    """
    for name, value in (("count", count), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name}={value} must be positive")
    plan, guided = make_plan(config, schedule), _steered(denoiser, config, latent=decode is not None)
    images, share, device = [], world.share(count), torch.device(device)
    written: list[Future[object]] = []
    with ThreadPoolExecutor(1) as writer, world.synchronize_errors():
        for first in range(share.start, share.stop, batch):
            index = torch.arange(first, min(first + batch, share.stop), device=device)

            def report(calls: int, _: int, done: int = first - share.start, size: int = len(index)) -> None:
                if progress is not None:
                    progress(done + calls * size // len(plan.calls), len(share))

            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                end = sample(
                    guided,
                    start_noise(seed, index, shape, plan),
                    plan,
                    None if labels is None else Conditioning(labels=labels[first : first + len(index)].to(device)),
                    noise=step_noise(seed, index, shape),
                    progress=report,
                )
            images.append(to_uint8(end if decode is None else decode(end)).cpu())
            if finished is not None and world.size == 1:
                for earlier in written:
                    if earlier.done():
                        earlier.result()  # raises write errors such as a full disk early
                written.append(writer.submit(finished, first, images[-1]))
        for last in written:
            last.result()
    found = world.all_gather_rows(torch.cat(images) if images else torch.empty(0))
    if finished is not None and world.size > 1 and world.is_main_process:
        finished(0, found)
    return found


def _steered(denoiser: Denoiser, config: SamplingConfig, *, latent: bool) -> Denoiser:
    """Return the denoiser wrapped in the configuration's guidance, thresholding and clipping."""
    guided = Guided(denoiser, config.guidance, config.guidance_interval)
    for name in ("threshold", "clip"):
        if latent and getattr(config, name) is not None:
            what = "dynamic thresholding" if name == "threshold" else "clipping"
            raise UserError(
                f"sampling.{name}={getattr(config, name)}: {what} is of pixels, but this run makes latents; leave it out"
            )
    if config.threshold is not None:
        return Thresholded(guided, config.threshold)
    if config.clip is not None and not SOLVERS[config.solver].clips:
        return Clipped(guided, config.clip)
    return guided
