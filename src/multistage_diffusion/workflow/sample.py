"""Drawing samples of a run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import RunConfig, SamplingConfig
from ..config.sampling import changed_sampler
from ..denoisers import MultiStageDenoiser
from ..errors import UserError, require
from ..latent.codecs import open_codec
from ..performance.devices import Precision, autocast_dtype, joined
from ..performance.execution import Execution, Graphs, execute
from ..performance.offload import (
    OneStageAtATime,
    images_at_once,
    require_memory_of_samples,
    require_sampling_memory,
)
from ..progress import Progress
from ..reporting.samples import Samples
from ..samplers.class_labels import class_number, frequent_labels, labels_in_turn, names_of
from ..samplers.sampling import sample_images
from ..training.run import Run
from .latent import decoder, recorded_scale


def opened_run(run: Run | Path | str) -> Run:
    """Return a run; open it if a path is given."""
    return run if isinstance(run, Run) else Run.open(Path(run))


def require_writable(run: Run, name: str) -> Path:
    """Return the path of a run's file, after checking that it can be written.

    Raises:
        UserError: if it cannot.
    """
    path = run.path / name
    if not os.access(run.path, os.W_OK | os.X_OK):
        raise UserError(f"{run.path}: {name} cannot be written in it; check its permissions, or copy the run")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, not a file; move it away")
    return path


def sample(
    run: Run | Path | str,
    count: int = 64,
    *,
    seed: int = 0,
    sampling: SamplingConfig | Mapping[str, Any] | None = None,
    checkpoint: str = "best",
    ema: float | None = None,
    label: int | str | None = None,
    in_turn: bool = False,
    batch: int | None = None,
    device: str | None = None,
    precision: Precision | Literal["auto"] = "auto",
    compile: bool = False,
    offload: bool = False,
    finished: Callable[[int, Tensor], object] | None = None,
    progress: Progress | None = None,
) -> Samples:
    """Draw samples of a run; each of several processes (see distributed.join) draws a share and receives all samples.

    Args:
        run: a trained run, or its folder.
        count: number of samples.
        seed: seed of the samples; sample i is the same for any count and batch.
        sampling: another sampler than the run's own, or changes to it, such as {"solver": "heun", "calls": 35}.
        checkpoint: "best", "latest" or a step.
        ema: width sigma_rel of another average of the weights, computed from the run's snapshots, see `Run.denoiser`; None:
            the checkpoint's own.
        label: name or number of the class of all samples of a class-conditional run; None draws each sample's class,
            see `sample_labels`.
        in_turn: take the classes in turn instead, for viewing, not for measuring.
        batch: samples drawn at once; None: as many as fit into free memory, up to the number beyond which speed is
            constant.
        device: default CUDA when there is one.
        precision: of the network; the trajectory is float32. "auto": on CUDA bf16 if supported, else fp16; on CPU fp32.
        compile: compile the network's blocks first, which takes minutes and pays off for thousands of samples.
        offload: keep only the parts of one stage and the shared parts on the device.
        finished: called with (number of the first, images) of each batch while the next is drawn, see sample_images.
        progress: called with (done, total).

    Returns:
        A tensor uint8 (count, C, H, W) that also knows the samples' classes; its method `pil` gives images of Pillow.

    Raises:
        UserError: if there is no such checkpoint, average, class, sampler or precision.
    """
    run = opened_run(run)
    config, (world, resolved) = run.config(), joined(device, "sample")
    labels = sample_labels(config, count, seed=seed, label=label, in_turn=in_turn)
    sampling = changed_sampler(config.sampling, sampling)
    rows = 1 if sampling.guidance in (0, 1) else 2
    require_sampling_memory(config.network, config.input_shape, count, batch, resolved, rows)
    decode = None
    if config.codec.used:
        scale = recorded_scale(config.codec)
        decode = decoder(open_codec(config.codec, resolved), scale)
    if precision == "fp64":
        raise UserError("precision='fp64' is for training only; take auto, fp32, bf16 or fp16")
    with world.report_failures():
        denoiser = run.denoiser(checkpoint, "ema" if ema is None else ema, device="cpu" if offload else resolved)
        equip(denoiser, resolved, compile=compile, offload=offload)
        if batch is None:
            batch = images_at_once(config.network, config.input_shape, count, resolved, rows)
        images = sample_images(
            denoiser,
            config.input_shape,
            count,
            config=sampling,
            schedule=config.diffusion.schedule,
            seed=seed,
            batch=batch,
            labels=labels,
            device=resolved,
            progress=progress,
            decode=decode,
            autocast=autocast_dtype(precision, resolved),
            finished=finished,
            world=world,
        )
    return Samples.of(images, labels, names_of(config, labels))


def sample_labels(
    config: RunConfig, count: int, *, seed: int = 0, label: int | str | None = None, in_turn: bool = False
) -> Tensor | None:
    """Return the class of every sample that `sample` draws, int64 (count,); None for an unconditional run.

    Args:
        config: the run's.
        count, seed: see `sample`; label i depends on (seed, i) alone.
        label: name or number of the class of all samples; None: drawn with the frequencies of the training images.
        in_turn: take the classes that have training images in turn.

    Raises:
        UserError: if count is not positive or more than memory can hold, or there is no such class.
    """
    require(count > 0, f"count={count} must be positive")
    require_memory_of_samples(config.input_shape, count)  # before labels of so many are made
    if label is None:
        return labels_in_turn(config, count) if in_turn else frequent_labels(config, count, seed)
    return torch.full((count,), class_number(config, label))


def equip(denoiser: MultiStageDenoiser, device: torch.device, *, compile: bool = False, offload: bool = False) -> None:
    """Set a denoiser up for fast or low-memory sampling: CUDA graphs, compiled blocks, one stage at a time.

    Args:
        denoiser: on the device, or on the CPU if it is to be offloaded.
        device: the device for sampling.
        compile, offload: see `sample`.
    """
    execute(denoiser.network, Execution(compile=compile, channels_last=compile and device.type == "cuda"))
    if offload:  # offloaded weights move, so they cannot be in a CUDA graph
        OneStageAtATime(denoiser.network, device)
    elif device.type == "cuda":
        denoiser.graphs = Graphs(denoiser.network)
