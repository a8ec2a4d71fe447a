"""Using a trained run: sampling, evaluation, report."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ..codecs import open_codec
from ..config import DataConfig, SamplingConfig
from ..data import open_configured
from ..description import architecture_rows, describe
from ..evaluation import EvaluationResult, evaluate_samples, get_features, nearest
from ..keyed import generator
from ..sampling import sample_images
from ..serialization import read_json, to_dict, write_json
from ..training.callbacks import example_labels
from ..training.checkpoint import checkpoint_step
from ..training.devices import resolve_device
from ..training.run import Run
from .latent import decoder, reconstruct
from .progress import Progress

NEIGHBOURS = 3  # of precision and recall, as published


def _opened(run: Run | Path | str) -> Run:
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
    """Draw samples of a run.

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
    run = _opened(run)
    config, resolved = run.config(), resolve_device(device)
    classes = config.network.num_classes
    if label is not None and not 0 <= label < classes:
        known = f"it must be in 0..{classes - 1}" if classes else "the run knows no classes; leave it out"
        raise ValueError(f"label={label}: {known}")
    decode = None
    if config.codec.used:
        assert config.codec.scale is not None
        decode = decoder(open_codec(config.codec, resolved), config.codec.scale)
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
    )


def evaluate(
    run: Run | Path | str,
    data: DataConfig | None = None,
    *,
    count: int | None = None,
    features: str = "pixels",
    seed: int = 0,
    checkpoint: str = "best",
    sampling: SamplingConfig | None = None,
    device: str | None = None,
    progress: Progress | None = None,
) -> EvaluationResult:
    """Compare samples of a run with real images and add the result to RUN/evaluation.json.

    Args:
        run: a trained run, or its folder.
        data: other data to compare with than the run's own; their training part then stands for the images trained on.
        count: samples drawn; default as many as there are held-out images, but 500 to 5000.
        features: name of a feature extractor.
        seed: of the samples.
        checkpoint: "best", "latest" or a step.
        sampling: another sampler than the run's own.
        device: default CUDA when there is one.
        progress: called with (done, total).

    Raises:
        ValueError: if there are too few images, or data and run differ in shape.
    """
    extractor, run = get_features(features), _opened(run)
    config = run.config()
    opened = run.data() if data is None else open_configured(data)
    if opened.shape != config.data.shape:
        found, made = (" x ".join(map(str, shape)) for shape in (opened.shape, config.data.shape))
        raise ValueError(
            f"data: images of {found} (channels x height x width), but {run.path} makes {made}; give --size H W --fit crop "
            "for another size, or convert them to as many channels"
        )
    share = (data or config.data).held_out
    if share != config.data.held_out and opened.fingerprint == config.data.fingerprint:
        raise ValueError(
            f"data.held_out={share}: {run.path} was trained on these data with {config.data.held_out}; use that"
        )
    train_images, held_out = (part.tensor() for part in opened.split(share))
    count = min(max(len(held_out), 500), 5000) if count is None else count
    if min(count, len(train_images), len(held_out)) <= NEIGHBOURS:
        raise ValueError(
            f"{count} samples, {len(train_images)} training and {len(held_out)} held-out images are too few to compare: "
            f"need more than {NEIGHBOURS} of each; give other images with --data, or train with a larger data.held_out"
        )
    step = checkpoint_step(run.checkpoint(checkpoint))  # which one is best may change while a run goes on
    images = sample(run, count, seed=seed, sampling=sampling, checkpoint=str(step), device=device, progress=progress)
    reconstructed = reconstruct(config, held_out, resolve_device(device)) if config.codec.used else None
    result = evaluate_samples(images, train_images, held_out, extractor, k=NEIGHBOURS, reconstructed=reconstructed)
    entry = {
        "step": step,
        "data": (data or config.data).source,
        "sampling": to_dict(sampling or config.sampling),
        "sampling_seed": seed,
        **to_dict(result),
    }
    file = run.path / "evaluation.json"
    write_json(file, [*(read_json(file) if file.exists() else []), entry])
    return result


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

    run = _opened(run)
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
