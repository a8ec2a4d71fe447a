"""Presets for one's own images: a network and a length of training by size of the images and kind of device.

The stages are even in the time of the VP kernel: with EDM's density, edges at lower noise cost quality (docs/efficiency.md).
`sigma_data` is typical of photographs; `workflow.auto` replaces it by that of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..schedules import LogNormal
from ..schedules.edm import EDM
from ..stages import Stages
from . import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)

LATENT_CHANNELS = 4
EDGES = (1.4692, 9.5963)  # sigma


@dataclass(frozen=True, kw_only=True)
class _Size:
    """What an image preset sets: network and length of training.

    Attributes:
        widths: of the encoder, and of the decoders from low noise to high.
        channel_mult: multiples of the width, one per resolution.
        blocks: residual blocks per resolution.
        attention: downsampling factors at which there is attention.
        batch, steps, lr: of the training.
        downsampling: side of an image over that of its latent; 1: trained on pixels.
    """

    widths: tuple[int, int, int, int]
    channel_mult: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...]
    batch: int
    steps: int
    lr: float
    downsampling: int = 1


_SIZES = {
    (32, "cpu"): _Size(
        widths=(16, 16, 16, 8),
        channel_mult=(1, 2, 2),
        blocks=1,
        attention=(4,),
        batch=64,
        steps=5_000,
        lr=4e-3,
    ),
    (64, "cpu"): _Size(
        widths=(16, 16, 8, 8),
        channel_mult=(1, 2, 2, 2),
        blocks=1,
        attention=(8,),
        batch=64,
        steps=5_000,
        lr=2e-3,
    ),
    (128, "cpu"): _Size(
        widths=(16, 16, 8, 8),
        channel_mult=(1, 2, 2, 2, 2),
        blocks=1,
        attention=(16,),
        batch=32,
        steps=10_000,
        lr=2e-3,
    ),
    (256, "cpu"): _Size(
        widths=(64, 64, 32, 16),
        channel_mult=(1, 2, 2),
        blocks=1,
        attention=(2, 4),
        batch=64,
        steps=10_000,
        lr=1e-3,
        downsampling=8,
    ),
    (32, "gpu"): _Size(
        widths=(128, 128, 64, 32),
        channel_mult=(2, 2, 2),
        blocks=3,
        attention=(2,),
        batch=256,
        steps=200_000,
        lr=1e-3,
    ),
    (64, "gpu"): _Size(
        widths=(128, 128, 64, 32),
        channel_mult=(1, 2, 2, 2),
        blocks=3,
        attention=(4,),
        batch=256,
        steps=200_000,
        lr=5e-4,
    ),
    (128, "gpu"): _Size(
        widths=(96, 96, 64, 32),
        channel_mult=(1, 2, 2, 3, 3),
        blocks=2,
        attention=(8, 16),
        batch=128,
        steps=400_000,
        lr=3e-4,
    ),
    (256, "gpu"): _Size(
        widths=(192, 192, 128, 64),
        channel_mult=(1, 2, 3),
        blocks=2,
        attention=(1, 2, 4),
        batch=128,
        steps=400_000,
        lr=2e-4,
        downsampling=8,
    ),
}
IMAGE_SIZES = tuple(sorted({size for size, _ in _SIZES}))


def _made(size: int, device: str) -> RunConfig:
    found = _SIZES[size, device]
    side, latent = size // found.downsampling, found.downsampling > 1
    images = found.batch * found.steps
    every = found.steps // 10
    return RunConfig(
        name=preset_name(size, device),
        data=DataConfig(source="", size=(size, size), fit="crop", shape=(3, size, size)),
        codec=CodecConfig(shape=(LATENT_CHANNELS, side, side)) if latent else CodecConfig(),
        network=NetworkConfig.of(
            "ddpmpp",
            channels=LATENT_CHANNELS if latent else 3,
            encoder_width=found.widths[0],
            decoder_widths=found.widths[1:],
            channel_mult=found.channel_mult,
            blocks_per_level=found.blocks,
            attention_factors=found.attention,
            dropout=0.0 if device == "cpu" else 0.1,
        ),
        diffusion=DiffusionConfig(precondition="edm", sigma_data=0.5, schedule=EDM(), prior=LogNormal()),
        stages=Stages(EDGES, {"rule": "timestep"}),
        optimizer=OptimizerConfig(lr=found.lr, warmup_steps=min(1000, found.steps // 20), decay_after=found.steps // 3),
        training=TrainingConfig(
            steps=found.steps,
            batch=found.batch,
            update_mode="mixed",
            shares="prior",
            floor_share=0.05,
            overlap=0.25,
            ema_halflife=0.05 * images,
            ema_rampup=0.1,
            flip=False,
            log_every=max(50, every // 20),
            held_out_every=every // 2,
            checkpoint_every=every // 2,
            sample_every=every,
        ),
        sampling=SamplingConfig(),
        evaluation=EvaluationConfig(
            every=found.steps // 4, count=500 if device == "cpu" else 5000, features="thumbnails"
        ),
    )


def preset_name(size: int, device: str) -> str:
    """Return the name of the preset for images of a size on "cpu" or "gpu"."""
    return f"images-{size}-{device}"


def fitting_preset(side: int, device: str) -> str:
    """Return the name of the preset for images whose longer side has so many pixels."""
    return preset_name(next((size for size in IMAGE_SIZES if size >= side), IMAGE_SIZES[-1]), device)


def _preset(size: int, device: str) -> Callable[[], RunConfig]:
    def made() -> RunConfig:
        return _made(size, device)

    what = "latents of images" if _SIZES[size, device].downsampling > 1 else "images"
    made.__doc__ = f"Your own {what} of {size}x{size}, for {'a GPU' if device == 'gpu' else 'two CPU cores'}."
    return made


IMAGE_PRESETS = {preset_name(size, device): _preset(size, device) for size, device in _SIZES}
