"""Presets: functions that return a whole run configuration; the first line of each docstring is its summary."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from ..errors import UserError
from ..schedules import LogNormal
from . import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from .image_presets import IMAGE_PRESETS
from .paper_presets import PAPER_PRESETS, vp_stages
from .transformer_presets import TRANSFORMER_PRESETS, digits_uvit


def digits() -> RunConfig:
    """8x8 handwritten digits (scikit-learn): three decoders, five minutes on two CPU cores."""
    return RunConfig(
        name="digits",
        data=DataConfig(source="digits", shape=(1, 8, 8)),
        network=NetworkConfig.of(
            "ddpmpp",
            channels=1,
            encoder_width=16,
            decoder_widths=(32, 16, 16),
            channel_mult=(1, 2),
            blocks_per_level=1,
            attention_factors=(2,),
            dropout=0.0,  # minutes of training do not overfit
        ),
        diffusion=DiffusionConfig(precondition="edm", sigma_data=0.75, prior=LogNormal(p_mean=-0.6, p_std=1.4)),
        stages=vp_stages((0.188, 0.577), rule="interval-mean", data_range=[-1.0, 1.0], data="digits"),
        optimizer=OptimizerConfig(lr=2e-3, warmup_steps=200),
        training=TrainingConfig(
            steps=2600,
            batch=96,
            shares=(0.55, 0.35, 0.1),  # the middle and high noise are learnt sooner
            ema_halflife=50_000,
            ema_rampup=0.1,
            flip=False,
            log_every=100,
            held_out_every=200,
            checkpoint_every=200,
            sample_every=400,
        ),
        sampling=SamplingConfig(sigma_min=0.005, sigma_max=40.0),
    )


def fashion_mnist() -> RunConfig:
    """Fashion-MNIST at 28x28: three decoders, half an hour on one CPU core."""
    base = IMAGE_PRESETS["images-32-cpu"]()
    return dataclasses.replace(
        base,
        name="fashion-mnist",
        data=DataConfig(source="fashion-mnist", shape=(1, 28, 28)),
        network=dataclasses.replace(base.network, channels=1),
        diffusion=dataclasses.replace(base.diffusion, sigma_data=0.59),
        evaluation=dataclasses.replace(base.evaluation, features="fashion-classifier"),
    )


def fashion_mnist_latent() -> RunConfig:
    """Fashion-MNIST on 4x8x8 latents (--codec, of msdiff train-codec): LDM U-Net with three decoders, for two CPU cores.

    The images are padded to 32x32. The stages are cut where the paper cuts LDM's 1000 steps.
    """
    paper, base = PAPER_PRESETS["celebahq-ldm"](), digits()
    return dataclasses.replace(
        base,
        name="fashion-mnist-latent",
        data=DataConfig(source="fashion-mnist", size=(32, 32), fit="pad", shape=(1, 32, 32)),
        codec=CodecConfig(shape=(4, 8, 8)),
        network=NetworkConfig.of(
            "ldm",
            channels=4,
            encoder_width=64,
            decoder_widths=(96, 64, 64),
            channel_mult=(1, 1),
            blocks_per_level=2,
            attention_factors=(2,),
            dropout=0.0,
        ),
        diffusion=paper.diffusion,
        stages=paper.stages,
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=200),
        training=dataclasses.replace(
            base.training,
            steps=3000,
            batch=96,
            shares="uniform",
            ema_halflife=50_000,
            held_out_every=500,
            checkpoint_every=500,
            sample_every=1000,
        ),
        sampling=SamplingConfig(),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "digits-uvit": digits_uvit(digits),
    "fashion-mnist": fashion_mnist,
    "fashion-mnist-latent": fashion_mnist_latent,
    **TRANSFORMER_PRESETS,
    **IMAGE_PRESETS,
    **PAPER_PRESETS,
}


def summary(name: str) -> str:
    """Return the one-line summary of a preset."""
    return (PRESETS[name].__doc__ or "").partition("\n")[0]


def preset(name: str) -> RunConfig:
    """Return a preset by name.

    Raises:
        UserError: if the name is unknown, listing the known ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(PRESETS)}"
        raise UserError(f"preset {name!r} is unknown; {hint}")
    return PRESETS[name]()
