"""The main job as Python functions; the command line is a thin layer over them.

result = split("digits", out=Path("split.json"))
run = train(preset("digits"), Path("runs/digits"), split=result)
images = sample(run, count=64)
scores = evaluate(run)
report(run)
"""

from __future__ import annotations

import dataclasses
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import DataConfig, RunConfig, SamplingConfig
from .data import ImageData, open_configured
from .describe import architecture_rows, describe
from .evaluation import EvaluationResult, evaluate_samples, get_features, nearest
from .nets.cost import network_cost
from .pictures import grid, save_png
from .presets import preset
from .report import Neighbours, write_report
from .sampling import sample_images
from .schedules import VP, NoiseSchedule
from .serialization import override, read_json, to_dict, write_json
from .splitting import SplitResult, SplitSettings, find_stages
from .splitting.plots import plot_split
from .training.callbacks import SampleGrid, example_labels
from .training.checkpoint import checkpoint_step
from .training.run import Run
from .training.trainer import Callback, Trainer, resolve_device

Progress = Callable[[int, int], None]


def split(
    data: ImageData | str | DataConfig,
    settings: SplitSettings | None = None,
    *,
    schedule: NoiseSchedule | None = None,
    out: Path | None = None,
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
        result.save(out)
        plot_split(result, out.with_suffix(".png"))
    return result


def prepare(config: RunConfig, data: ImageData, result: SplitResult | None = None) -> RunConfig:
    """Fit a configuration to its data and its split.

    Args:
        config: usually a preset.
        data: the whole data set: gives channels, shape and fingerprint.
        result: gives the stages; None keeps those of the configuration.

    Raises:
        ValueError: if the split was made in another data range than networks train on, or has another number of stages.
    """
    stages = config.stages
    if result is not None:
        if tuple(result.data_range) != (-1.0, 1.0):
            low, high = result.data_range
            raise ValueError(
                f"stages: the split was made with data_range [{low:g}, {high:g}], but networks train on [-1, 1], where its "
                "edges mean other noise; run msdiff split without --data-range"
            )
        stages = result.stages()
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, fingerprint=data.fingerprint, shape=data.shape),
        network=dataclasses.replace(config.network, channels=data.shape[0]),
        stages=stages,
    )


def train(
    config: RunConfig,
    out: Path,
    *,
    result: SplitResult | None = None,
    replace: bool = False,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    data: ImageData | None = None,
) -> Run:
    """Start a run and train it to its end.

    Args:
        config: usually a preset, changed with `override`.
        out: the run's new folder.
        result: the split that gives the stages; None keeps those of the configuration.
        replace: move a run that is there already aside.
        device: default CUDA when there is one.
        callbacks: progress, TensorBoard, ...
        data: the data set, if it has been opened already.

    Raises:
        ValueError: if something does not fit; nothing has been written then.
    """
    data = data or open_configured(dataclasses.replace(config.data, fingerprint="", shape=()))
    if result is not None and result.fingerprint not in (
        "",
        data.fingerprint,
        data.split(config.data.held_out)[0].fingerprint,
    ):
        warnings.warn("the split was made on other data than these; its edges may not suit them", stacklevel=2)
    config = prepare(config, data, result)
    network_cost(config.network, *data.shape[1:])  # a network that cannot be built is refused before the folder is made
    resolve_device(device)
    run = Run.create(out, config, replace=replace)
    if result is not None:
        result.save(run.path / "split.json")
        plot_split(result, run.path / "split.png")
    return _fit(run, data, device, callbacks)


# What may differ when a run is resumed: its length and what is written when, never what is computed.
CHANGEABLE = (
    "data.source",
    "training.steps",
    "training.log_every",
    "training.held_out_every",
    "training.checkpoint_every",
    "training.keep_last",
    "training.keep_every",
    "training.sample_every",
    "training.sample_count",
)


def resume(
    path: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> Run:
    """Go on with a run from its latest checkpoint.

    Args:
        path: the run's folder.
        changes: dotted keys to change, of CHANGEABLE only: a longer training, data that have moved.
        device: default CUDA when there is one.
        callbacks: progress, TensorBoard, ...

    Raises:
        ValueError: if there is no run, a change would make it another run, or the data are not those it was started on.
    """
    run = Run.open(path)
    config = run.config()
    changed = override(config, changes or {})
    for key, value in (changes or {}).items():
        if key not in CHANGEABLE and override(config, {key: value}) != config:
            raise ValueError(
                f"{key}={value!r} differs from the run's own; resuming may change only {', '.join(CHANGEABLE)}; start a new "
                "run for anything else"
            )
    data = run.data(changed.data)
    if changed != config:
        write_json(run.config_file, changed)
    return _fit(run, data, device, callbacks)


def _fit(run: Run, data: ImageData, device: str | None, callbacks: Sequence[Callback]) -> Run:
    train_images, held_out = data.split(run.config().data.held_out)
    trainer = Trainer(run, train_images, held_out, device=device, callbacks=[*callbacks, SampleGrid(data.shape)])
    with stop_on_interrupt(trainer):
        trainer.fit()
    return run


@contextmanager
def stop_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """Let Ctrl-C (or SIGTERM) end training after the current step, with a checkpoint; a second one ends it at once.

    Raises:
        KeyboardInterrupt: once the checkpoint is written.
    """
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return

    def stop(*_: object) -> None:
        trainer.stop()
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if trainer.stopping:
        raise KeyboardInterrupt


def sample(
    run: Run,
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
        run: a trained run.
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
    """
    config, resolved = run.config(), resolve_device(device)
    return sample_images(
        run.denoiser(checkpoint, device=resolved),
        config.data.shape,
        count,
        config=sampling or config.sampling,
        schedule=config.diffusion.schedule,
        seed=seed,
        batch=batch,
        labels=example_labels(config.network.num_classes, count) if label is None else torch.full((count,), label),
        device=resolved,
        progress=progress,
    )


def evaluate(
    run: Run,
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
        run: a trained run.
        data: other data to compare with than the run's own.
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
    extractor = get_features(features)
    config = run.config()
    opened = run.data() if data is None else open_configured(data)
    if opened.shape != config.data.shape:
        raise ValueError(f"data: images of {opened.shape}, but {run.path} makes {config.data.shape}; give --size")
    train_images, held_out = (part.images for part in opened.split((data or config.data).held_out))
    count = count or min(max(len(held_out), 500), 5000)
    images = sample(run, count, seed=seed, sampling=sampling, checkpoint=checkpoint, device=device, progress=progress)
    result = evaluate_samples(images, torch.from_numpy(train_images), torch.from_numpy(held_out), extractor)
    file = run.path / "evaluation.json"
    earlier = read_json(file) if file.exists() else []
    entry = {
        "step": checkpoint_step(run.checkpoint(checkpoint)),
        "data": (data or config.data).source,
        "sampling": to_dict(sampling or config.sampling),
        "sampling_seed": seed,
        **to_dict(result),
    }
    write_json(file, [*earlier, entry])
    return result


def report(
    run: Run, *, checkpoint: str = "best", count: int = 64, device: str | None = None, progress: Progress | None = None
) -> Path:
    """Write RUN/report.html: stages, network, losses, samples, nearest neighbours, metrics, command and configuration.

    Args:
        run: a trained run.
        checkpoint: whose samples are shown.
        count: samples shown.
        device: default CUDA when there is one.
        progress: called with (done, total).
    """
    config = run.config()
    train_images, held_out = (torch.from_numpy(part.images) for part in run.data().split(config.data.held_out))
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
        real=real[:count],
        neighbours=Neighbours(samples=images[:16], nearest=train_images[index[:16]], distances=distance[:16].tolist()),
        split_png=split_png if split_png.exists() else None,
    )


def demo(
    out: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    callbacks: Sequence[Callback] = (),
    bar: Callable[[str], AbstractContextManager[Progress]],
) -> tuple[Path, EvaluationResult]:
    """Do the whole job on the digits: split, train, sample, evaluate, report; goes on where it was interrupted.

    Args:
        out: the run's folder.
        changes: dotted keys of the digits preset to change.
        device: default CUDA when there is one.
        callbacks: of training.
        bar: makes a progress display from a title.

    Returns:
        The report's path and the evaluation.
    """
    if Run(out).config_file.exists():
        run = resume(out, changes, device=device, callbacks=callbacks)
    else:
        config = override(preset("digits"), changes or {})
        with bar("finding stages") as progress:
            result = split(config.data, progress=progress, device=device)
        run = train(config, out, result=result, device=device, callbacks=callbacks)
    with bar("sampling") as progress:
        save_png(grid(sample(run, 100, device=device, progress=progress)), out / "samples.png")
    with bar("evaluating") as progress:
        scores = evaluate(run, count=2000, device=device, progress=progress)
    with bar("reporting") as progress:
        return report(run, device=device, progress=progress), scores
