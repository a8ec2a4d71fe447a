"""A tiny run configuration, and random images to go with it."""

from __future__ import annotations

import numpy as np

from multistage_diffusion.config import (
    DataConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from multistage_diffusion.config.serialization import override
from multistage_diffusion.data import ImageData
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.stages import Stages

TINY = RunConfig(
    name="tiny",
    data=DataConfig(source="", shape=(1, 4, 4)),
    network=NetworkConfig.of(
        family="ddpmpp",
        channels=1,
        encoder_width=8,
        decoder_widths=(12, 8, 4),
        channel_mult=(1,),
        blocks_per_level=1,
        attention_factors=(),
        dropout=0.1,
    ),
    diffusion=DiffusionConfig(precondition="edm", prior=LogNormal()),
    stages=Stages((0.2, 0.6)),
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=0),
    training=TrainingConfig(
        steps=4,
        batch=12,
        ema_halflife=100.0,
        log_every=1,
        held_out_every=0,
        held_out_rows=4,
        checkpoint_every=1000,
    ),
    sampling=SamplingConfig(calls=4, sigma_min=0.05, sigma_max=10.0),
)


def tiny_config(**changes: object) -> RunConfig:
    """Return TINY with keys changed, e.g. tiny_config(training__steps=3)."""
    return override(TINY, {key.replace("__", "."): value for key, value in changes.items()})


def tiny_data(
    count: int = 30, *, classes: int = 0, shape: tuple[int, int, int] = (1, 4, 4), seed: int = 0
) -> ImageData:
    """Return random images, the class of each its number modulo classes."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)
    return ImageData(pixels, np.arange(count) % classes if classes else None, "random")
