"""Training of a small KL autoencoder: the codec of latent runs, in diffusers' layout.

FOLDER/config.json, diffusion_pytorch_model.safetensors   the codec (EMA weights), readable by diffusers
       training/step_N/                                    checkpoints to resume from, see training/checkpoint.py
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from .. import rng
from ..config.serialization import from_dict, to_dict
from ..contracts import Codec
from ..data import ImageData, to_float, to_uint8
from ..data.rows import read
from ..errors import UserError, require
from ..files import write_atomic
from ..memory import require_memory
from ..performance.offload import free_memory
from ..progress import Progress
from ..training import checkpoint as ckpt
from ..training.ema import EMA
from ..training.metrics import TrainingDiverged
from .codecs import CONFIG, WEIGHTS, DiffusersCodec, import_diffusers
from .latents import PIXELS_AT_ONCE

CHECKPOINT_EVERY = 500  # steps
MOST_MEASURED = 10_000  # most images that `codec_quality` measures
WARMUP_STEPS = 100
CLIP = 1.0  # largest gradient norm
SQUARED_WEIGHT = 10.0  # scales squared errors in [-1, 1] to the magnitude of absolute errors
EMA_HALFLIFE, EMA_RAMPUP = 20_000.0, 0.05  # images; share of the images seen
LEAST_WIDTH = 16


@dataclass(frozen=True, kw_only=True)
class CodecSettings:
    """A KL autoencoder and its training.

    Attributes:
        latent_channels: channels of a latent.
        factor: image height and width divided by latent height and width, a power of 2.
        width: channels of the networks at latent resolution; halved at each doubling of the resolution, but not below
            16.
        steps, batch: optimiser steps, and images per step.
        lr: learning rate of Adam after a short warm-up.
        kl: weight of the KL divergence from N(0, 1). The divergence is summed over a latent and divided by the number
            of values of an image; reconstruction errors are averaged over the same values.
        seed: of all random numbers.
    """

    latent_channels: int = 4
    factor: int = 4
    width: int = 32
    steps: int = 3000
    batch: int = 16
    lr: float = 4e-3
    kl: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("latent_channels", "factor", "width", "steps", "batch"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be positive")
        require(self.factor & (self.factor - 1) == 0, f"factor={self.factor} must be a power of 2")
        require(0 < self.lr < math.inf, f"lr={self.lr} must be positive and finite")
        require(0 <= self.kl <= 1e6, f"kl={self.kl} must be in [0, 1e6]")
        require(self.seed >= 0, f"seed={self.seed} must be >= 0")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the networks at each resolution, starting at image resolution."""
        halvings = reversed(range(self.factor.bit_length()))
        return tuple(min(self.width, max(self.width >> i, LEAST_WIDTH)) for i in halvings)


def build_autoencoder(settings: CodecSettings, shape: tuple[int, int, int]) -> Any:
    """Return a newly initialised AutoencoderKL of diffusers for images of shape (C, H, W).

    Raises:
        UserError: if height or width is not a multiple of the factor, or diffusers is missing.
    """
    diffusers, widths = import_diffusers(), settings.widths
    torch.manual_seed(rng.fold((settings.seed, "initial codec weights")) >> 1)
    model = diffusers.AutoencoderKL(
        in_channels=shape[0],
        out_channels=shape[0],
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        block_out_channels=widths,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=math.gcd(8, *widths),
        sample_size=max(shape[1:]),
        mid_block_add_attention=False,  # keeps latents local for any image size, and the decoder cheap
    )
    DiffusersCodec(model, name="the codec").latent_shape(shape)
    return model.requires_grad_(True).train()


def require_codec_memory(settings: CodecSettings, shape: tuple[int, int, int], device: torch.device) -> None:
    """Raise before anything is built if memory cannot hold the codec or a batch.

    Raises:
        UserError: naming width or batch.
    """
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_autoencoder(settings, shape).parameters())
    there = free_memory(device)
    require_memory(
        5 * 4 * parameters,  # float32: weights, gradients, two Adam moments, EMA
        f"width={settings.width} (a codec of {parameters:,} parameters)",
        "take a smaller width",
        there,
    )
    # one encoder block and two decoder blocks at image resolution, with at least four stored activation maps each
    maps = 3 * 4 * settings.widths[0] * shape[1] * shape[2]
    require_memory(4 * settings.batch * maps, f"batch={settings.batch}", "take a smaller batch", there)


def codec_loss(x: Tensor, output: Tensor, mean: Tensor, logvar: Tensor, kl: float) -> Tensor:
    """Return mean absolute error + SQUARED_WEIGHT * mean squared error + kl * divergence of the posterior from N(0, 1).

    Args:
        x, output: images and their reconstructions (B, C, H, W).
        mean, logvar: of the posterior N(mean, exp(logvar)), (B, c, h, w).
        kl: see CodecSettings.
    """
    error = output - x
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / x.numel()
    return error.abs().mean() + SQUARED_WEIGHT * error.square().mean() + kl * divergence


class CodecTrainer:
    """Trains a codec from scratch or, after `restore`, from the latest checkpoint in FOLDER/training.

    All random numbers depend only on (seed, step, row), so a resumed training equals an uninterrupted one.

    Args:
        folder: output folder of the codec; nothing is written before `fit`.
        settings: the codec and its training.
        data: training images.
        device: training device.

    Raises:
        UserError: if the images do not fit the factor, or memory cannot hold the codec or a batch.
    """

    def __init__(self, folder: Path, settings: CodecSettings, data: ImageData, device: torch.device) -> None:
        self.folder, self.settings, self.data, self.device = folder, settings, data, device
        require_codec_memory(settings, data.shape, device)
        self.model = build_autoencoder(settings, data.shape).to(device)
        self.ema: EMA[Any] = EMA(self.model, EMA_HALFLIFE, EMA_RAMPUP)
        # beta2 = 0.99 (short memory) because the loss falls fast at first
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=settings.lr, betas=(0.9, 0.99), fused=True)
        self.step, self.seconds, self.stopping = 0, 0.0, False

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.folder / "training"

    def fit(self, progress: Progress | None = None) -> None:
        """Train to the last step (or until `stop`) and save a checkpoint of it.

        Args:
            progress: called with (steps done, total steps).

        Raises:
            TrainingDiverged: if a loss or gradient is not finite; the last checkpoint is kept.
            OSError: if a checkpoint cannot be written; the previous one is kept.
        """
        while self.step < self.settings.steps and not self.stopping:
            start = time.perf_counter()
            self._iterate()
            self.seconds += time.perf_counter() - start
            if progress:
                progress(self.step, self.settings.steps)
            if self.step % CHECKPOINT_EVERY == 0 or self.step == self.settings.steps or self.stopping:
                self._save()

    def stop(self) -> None:
        """Make `fit` end after the current step, with a checkpoint."""
        self.stopping = True

    def codec(self) -> DiffusersCodec:
        """Return the current codec, with EMA weights."""
        return DiffusersCodec(self.ema.module, name="the codec")

    def _iterate(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.lr * min(1.0, (self.step + 1) / WARMUP_STEPS)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        for name, value in (("loss", loss), ("gradient", norm)):
            if not math.isfinite(value.item()):
                raise TrainingDiverged(
                    f"the codec's {name} is not finite at step {self.step + 1}; stopped before the optimiser step, "
                    f"{self._kept()}; start again with a lower lr than {self.settings.lr:g}"
                )
        self.optimizer.step()
        self.ema.update(self.settings.batch, self.step * self.settings.batch)
        self.step += 1

    def _loss(self) -> Tensor:
        seed, rows = self.settings.seed, torch.arange(self.settings.batch)
        u = rng.uniform((seed, "codec images", self.step), rows, 2)
        x = to_float(read(self.data, (u[:, 0] * len(self.data)).long()).to(self.device))
        # mirror half of the images, because runs with flips are trained on latents of mirrored images
        x = torch.where((u[:, 1] < 0.5).to(self.device)[:, None, None, None], x.flip(-1), x)
        posterior = self.model.encode(x).latent_dist
        key = (seed, "codec posterior", self.step)
        noise = rng.normal(key, rows.to(self.device), posterior.mean.shape[1:])
        output = self.model.decode(posterior.mean + posterior.std * noise).sample
        return codec_loss(x, output, posterior.mean, posterior.logvar, self.settings.kl)

    def _kept(self) -> str:
        found = ckpt.list_checkpoints(self.checkpoints)
        return f"the checkpoint of step {ckpt.checkpoint_step(found[-1])} is intact" if found else "no checkpoint yet"

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "settings": self.settings,
            "fingerprint": self.data.fingerprint,
        }
        checkpoint = ckpt.Checkpoint(
            model=self.model.state_dict(),
            ema=self.ema.module.state_dict(),
            optimizer=ckpt.optimizer_tensors(self.optimizer, self.model),
            state=to_dict(state),
        )
        ckpt.save_checkpoint(self.checkpoints, checkpoint)
        ckpt.prune(self.checkpoints, keep_last=1, keep_every=0)

    def restore(self) -> None:
        """Resume from the latest checkpoint; `steps` is the only setting that may differ.

        Raises:
            UserError: if there is no checkpoint, it was made with other settings or images, or its step exceeds
                `steps`.
        """
        found = ckpt.list_checkpoints(self.checkpoints)
        if not found:
            raise UserError(f"{self.folder}: there is no training of a codec to go on with; start it without --resume")
        path = found[-1]
        state = ckpt.read_state(path)
        for name in ("settings", "fingerprint", "seconds"):
            if name not in state:
                raise UserError(f"{path / 'state.json'}: {name} is missing; is this the training of a codec?")
        begun = to_dict(replace(from_dict(CodecSettings, state["settings"], str(path)), steps=self.settings.steps))
        for name, value in to_dict(self.settings).items():
            if begun[name] != value:
                raise UserError(
                    f"{name}={value!r}, but {self.folder} was begun with {begun[name]!r}; give that to go on, or train "
                    "another codec"
                )
        if state["fingerprint"] != self.data.fingerprint:
            raise UserError(f"{self.folder} was begun on other images than {self.data.name}; give those to go on")
        if state["step"] > self.settings.steps:
            raise UserError(
                f"steps={self.settings.steps} is below step {state['step']}, which {self.folder} has reached"
            )
        ckpt.restore_module(self.model, path, "model")
        ckpt.restore_module(self.ema.module, path, "ema")
        ckpt.restore_moments(self.optimizer, self.model, path)
        self.step, self.seconds = state["step"], state["seconds"]


@dataclass(frozen=True, kw_only=True)
class CodecQuality:
    """Reconstruction quality and latent statistics of a codec on a set of images.

    Attributes:
        images: number of images measured.
        psnr: peak signal-to-noise ratio in dB of uint8 reconstructions from posterior means, 10 log10(255^2 / MSE),
            with the MSE over all pixels of all images; None if they are exact.
        content_psnr: the same over the centred unpadded part; None without padding.
        latent_std: standard deviation of each latent channel, unscaled.
        scale: 1 / the standard deviation of all latents; None if they are all equal.
    """

    images: int
    psnr: float | None
    content_psnr: float | None
    latent_std: tuple[float, ...]
    scale: float | None


def codec_quality(codec: Codec, data: ImageData, device: torch.device) -> CodecQuality:
    """Measure a codec on at most MOST_MEASURED images, drawn at random if there are more."""
    order = torch.randperm(len(data), generator=rng.generator(("judged images",)))[:MOST_MEASURED]
    inside = _content(data)
    errors, latents = torch.zeros(2, dtype=torch.float64), []
    for part in torch.split(order, max(1, PIXELS_AT_ONCE // math.prod(data.shape[1:]))):
        images = read(data, part)
        latent, output = reconstruct(codec, images, device)
        square = (output.to(torch.float64) - images.to(torch.float64)).square()
        errors += torch.stack([square.mean((1, 2, 3)).sum(), square[inside].mean((1, 2, 3)).sum()])
        latents.append(latent)
    whole, content = (errors / len(order)).tolist()
    every = torch.cat(latents).to(torch.float64)
    spread = float(every.std(correction=0))
    return CodecQuality(
        images=len(order),
        psnr=psnr(whole),
        content_psnr=None if data.content is None else psnr(content),
        latent_std=tuple(every.std((0, 2, 3), correction=0).tolist()),
        scale=1 / spread if spread else None,
    )


def psnr(mean_squared_error: float) -> float | None:
    """Return the peak signal-to-noise ratio of uint8 images in dB; None if the error is 0."""
    return 10 * math.log10(255**2 / mean_squared_error) if mean_squared_error > 0 else None


def _content(data: ImageData) -> tuple[Any, ...]:
    """Return the index of the unpadded part of images (B, C, H, W)."""
    _, height, width = data.shape
    rows, columns = data.content or (height, width)
    top, left = (height - rows) // 2, (width - columns) // 2
    return ..., slice(top, top + rows), slice(left, left + columns)


def reconstruct(codec: Codec, images: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the latents and the uint8 reconstructions of images, uint8 (B, C, H, W); both on the CPU."""
    latents = codec.encode(to_float(images.to(device)))
    return latents.cpu(), to_uint8(codec.decode(latents)).cpu()


def write_codec(folder: Path, codec: DiffusersCodec) -> None:
    """Write a codec in the layout of diffusers' save_pretrained; each file is written atomically."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in codec.module.state_dict().items()}
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_atomic(folder / CONFIG, codec.module.to_json_string().encode())
