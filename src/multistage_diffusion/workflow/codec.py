"""Training a latent codec."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from .. import rng
from ..config import DataConfig
from ..config.serialization import to_dict
from ..data import ImageData
from ..data.rows import read
from ..data.sources import located, open_configured
from ..errors import UserError
from ..files import make_folder, move_aside, refuse_special, remove_folder, write_json
from ..latent.codec_training import CodecSettings, CodecTrainer, codec_quality, reconstruct, write_codec
from ..latent.codecs import CONFIG, WEIGHTS
from ..output_paths import require_room
from ..performance.devices import device_name, resolve_device
from ..progress import Progress
from ..reporting.pictures import grid, save_png
from ..training.checkpoint import list_checkpoints
from ..training.run import Run
from ..version import __version__
from .interrupts import stopped_by_signals

WRITTEN = (CONFIG, WEIGHTS, "training.json", "reconstructions.png")
SHOWN = 16  # held-out images in the reconstruction picture


def train_codec(
    data: str | DataConfig,
    out: Path | str,
    settings: CodecSettings | None = None,
    *,
    resume: bool = False,
    replace: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a latent codec on a data set's training images and measure it on its held-out images.

    Writes to OUT the codec (config.json, diffusion_pytorch_model.safetensors), training.json (what is returned),
    reconstructions.png (held-out images above their reconstructions) and training/ (to resume from).

    Args:
        data: the source of the images, or their whole configuration.
        out: the codec's folder.
        settings: the codec and its training.
        resume: continue the training in OUT, with the same settings or more steps.
        replace: move what is at OUT aside.
        device: default CUDA when there is one.
        progress: called with (steps done, steps in total).

    Raises:
        UserError: if the data cannot be read, hold nothing out or do not fit the settings, or OUT is taken.
        TrainingDiverged: if a loss is not finite.
        KeyboardInterrupt: after Ctrl-C, when the current codec has been written.
    """
    out, settings, resolved = Path(out), settings or CodecSettings(), resolve_device(device)
    config = DataConfig(source=data) if isinstance(data, str) else data
    if config.held_out == 0:
        raise UserError("data.held_out=0: a codec is measured on held-out images; give a share such as 0.1")
    # a training that was killed before its first checkpoint leaves only its lock
    taken = not resume and require_room(out, "continue its training (--resume)", replace=replace, ignored=".lock")
    images = open_configured(config)
    training, held_out = images.split(config.held_out)
    trainer = CodecTrainer(out, settings, training, resolved)
    for name in WRITTEN:
        refuse_special(out / name)
    if resume:
        trainer.restore()
    else:
        if taken:
            move_aside(out)
        make_folder(out)
    with Run(out).locked():
        try:
            with stopped_by_signals(trainer.stop):
                trainer.fit(progress)
        except Exception:
            if not resume and not list_checkpoints(trainer.checkpoints):
                remove_folder(out)  # no checkpoint: nothing can be resumed
            raise
        located_config = dataclasses.replace(
            config, source=located(config.source), fingerprint=images.fingerprint, shape=images.shape
        )
        record = _write(trainer, located_config, held_out)
    if trainer.stopping and trainer.step < settings.steps:
        raise KeyboardInterrupt(
            f"{out}: stopped at step {trainer.step}; the codec of this step is written; continue with the same command and "
            "--resume"
        )
    return record


def _write(trainer: CodecTrainer, data: DataConfig, held_out: ImageData) -> dict[str, Any]:
    """Write the current codec, its quality, and reconstructions of some held-out images."""
    out, codec = trainer.folder, trainer.codec()
    quality = codec_quality(codec, held_out, trainer.device)
    if quality.scale is not None:  # for pipelines of diffusers; our runs measure their own scale
        codec.module.register_to_config(scaling_factor=quality.scale)
    write_codec(out, codec)
    order = torch.randperm(len(held_out), generator=rng.generator((trainer.settings.seed, "shown images")))[:SHOWN]
    shown = read(held_out, order)
    rows = torch.stack([shown, reconstruct(codec, shown, trainer.device)[1]])
    columns = math.ceil(len(shown) / 2)  # two bands of originals above their reconstructions
    bands = [band for part in torch.split(rows, columns, dim=1) for band in part]
    save_png(grid(torch.cat(bands), columns=columns), out / "reconstructions.png")
    record = {
        "settings": trainer.settings,
        "data": data,
        "steps": trainer.step,
        "seconds": round(trainer.seconds, 1),
        "held_out": quality,
        "latent_shape": codec.latent_shape(held_out.shape),
        "parameters": {
            part: sum(p.numel() for p in getattr(codec.module, part).parameters()) for part in ("encoder", "decoder")
        },
        "device": device_name(trainer.device),
        "version": __version__,
    }
    write_json(out / "training.json", record)
    plain: dict[str, Any] = to_dict(record)
    return plain
