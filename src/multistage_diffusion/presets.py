"""Presets: functions that return a whole run configuration; the first line of each docstring says what it is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable

from .config import (
    DataConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from .paper_presets import PAPER_PRESETS, vp_stages
from .schedules import LogNormal


def digits() -> RunConfig:
    """8x8 handwritten digits (scikit-learn): three decoders, five minutes on two CPU cores."""
    return RunConfig(
        name="digits",
        data=DataConfig(source="digits", shape=(1, 8, 8)),
        network=NetworkConfig(
            family="ddpmpp",
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
    """Fashion-MNIST at 28x28: three decoders, for a GPU or a patient CPU."""
    base = digits()
    return dataclasses.replace(
        base,
        name="fashion-mnist",
        data=DataConfig(source="fashion-mnist", shape=(1, 28, 28)),
        network=dataclasses.replace(
            base.network,
            encoder_width=32,
            decoder_widths=(48, 32, 16),
            channel_mult=(1, 2, 2),
            blocks_per_level=2,
            dropout=0.1,
        ),
        optimizer=dataclasses.replace(base.optimizer, lr=1e-3, warmup_steps=1000),
        training=dataclasses.replace(
            base.training,
            steps=50_000,
            batch=128,
            flip=True,
            ema_halflife=500_000,
            held_out_every=1000,
            checkpoint_every=1000,
            sample_every=2000,
        ),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    **PAPER_PRESETS,
}


def summary(name: str) -> str:
    """Return what a preset is, in one line."""
    return (PRESETS[name].__doc__ or "").partition("\n")[0]


def preset(name: str) -> RunConfig:
    """Return a preset by name.

    Raises:
        ValueError: if there is none of that name, listing those there are.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(PRESETS)}"
        raise ValueError(f"preset {name!r} is unknown; {hint}")
    return PRESETS[name]()
