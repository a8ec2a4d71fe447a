"""Using a trained run: sampling, report."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..codecs import open_codec
from ..config import SamplingConfig
from ..description import architecture_rows, describe
from ..evaluation import get_features, nearest
from ..keyed import generator
from ..sampling import sample_images
from ..training.callbacks import example_labels
from ..training.devices import joined
from ..training.run import Run
from .latent import decoder
from .progress import Progress


def opened_run(run: Run | Path | str) -> Run:
    """Return a run, opened if it is only named."""
    return run if isinstance(run, Run) else Run.open(Path(run))


def sample(
    run: Run | Path | str,
    count: int = 64,
    *,
    seed: int = 0,
    sampling: SamplingConfig | None = None,
    checkpoint: str = "best",
    label: int | None = None,
    batch: int = 256,
    device: str | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Draw samples of a run; several processes (see distributed.join) draw a share each and are given all.

    Args:
        run: a trained run, or its folder.
        count: number of samples.
        seed: sample i is the same whatever the count or batch.
        sampling: another sampler than the run's own.
        checkpoint: "best", "latest" or a step.
        label: class of all samples of a class-conditional run; None takes all classes in turn.
        batch: samples drawn at once.
        device: default CUDA when there is one.
        progress: called with (done, total).

    Returns:
        uint8 (count, C, H, W).

    Raises:
        ValueError: if there is no such checkpoint, class or sampler.
    """
    run = opened_run(run)
    config, (world, resolved) = run.config(), joined(device)
    classes = config.network.num_classes
    if label is not None and not 0 <= label < classes:
        known = f"it must be in 0..{classes - 1}" if classes else "the run knows no classes; leave it out"
        raise ValueError(f"label={label}: {known}")
    decode = None
    if config.codec.used:
        assert config.codec.scale is not None
        decode = decoder(open_codec(config.codec, resolved), config.codec.scale)
    with world.announced():
        return sample_images(
            run.denoiser(checkpoint, device=resolved),
            config.input_shape,
            count,
            config=sampling or config.sampling,
            schedule=config.diffusion.schedule,
            seed=seed,
            batch=batch,
            labels=example_labels(classes, count) if label is None else torch.full((count,), label),
            device=resolved,
            progress=progress,
            decode=decode,
            world=world,
        )


def report(
    run: Run | Path | str,
    *,
    checkpoint: str = "best",
    count: int = 64,
    device: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write RUN/report.html: stages, network, losses, samples, nearest neighbours, metrics, command and configuration.

    Args:
        run: a trained run, or its folder.
        checkpoint: whose samples are shown.
        count: samples shown.
        device: default CUDA when there is one.
        progress: called with (done, total).
    """
    from ..report_page import Neighbours, write_report  # matplotlib takes a while to import

    run = opened_run(run)
    config = run.config()
    train_images, held_out = (part.tensor() for part in run.data().split(config.data.held_out))
    real = held_out if len(held_out) else train_images
    images = sample(run, count, checkpoint=checkpoint, device=device, progress=progress)
    pixels = get_features("pixels")
    distance, index = nearest(pixels(images), pixels(train_images))
    split_png = run.path / "split.png"
    return write_report(
        run.path,
        config=config,
        architecture=architecture_rows(describe(config)),
        samples=images,
        real=real[torch.randperm(len(real), generator=generator(("report", "real")))[:count]],
        neighbours=Neighbours(samples=images[:16], nearest=train_images[index[:16]], distances=distance[:16].tolist()),
        split_png=split_png if split_png.exists() else None,
    )
