"""Presets: functions that return a whole run configuration."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable
from typing import Any

from .config import (
    DataConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from .schedules import EDM, VP, LogNormal
from .stages import Stages

# The published cuts: Algorithm 1 on CIFAR-10 in [0, 1], reused by the paper for networks trained on [-1, 1]. Its second
# sigma is kept as printed although it is that of t = 0.636 (0.631 would give 7.414).
PAPER_T = (0.442, 0.631)
PAPER_SIGMA = (2.5103, 7.6577)


def _vp_stages(edges_t: tuple[float, ...], **origin: Any) -> Stages:
    """Stages cut at VP times."""
    return Stages(tuple(VP().edge_sigma(t) for t in edges_t), {"edges_t": list(edges_t), "schedule": "vp", **origin})


def digits() -> RunConfig:
    """8x8 handwritten digits (scikit-learn): three decoders, about four minutes on two CPU cores."""
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
        stages=_vp_stages((0.188, 0.577), rule="interval-mean", data_range=[-1.0, 1.0], data="digits"),
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


def cifar10_dpm() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++ with encoder 128, decoders 192/128/16 (Table 7, row 1).

    Training settings are the paper's; a tenth of the images is held out unless data.held_out says otherwise.
    """
    return RunConfig(
        name="cifar10-dpm",
        data=DataConfig(source="", shape=(3, 32, 32)),
        network=NetworkConfig(
            family="ncsnpp",
            encoder_width=128,
            decoder_widths=(192, 128, 16),
            channel_mult=(1, 2, 2, 2),
            blocks_per_level=8,
            attention_factors=(2,),
            dropout=0.1,
        ),
        diffusion=DiffusionConfig(precondition="vp-eps"),
        stages=_vp_stages(PAPER_T, rule="published", data_range=[0.0, 1.0], data="CIFAR-10"),
        optimizer=OptimizerConfig(lr=2e-4, warmup_steps=5000, clip=1.0),
        training=TrainingConfig(
            steps=250_000,
            batch=128,
            update_mode="one-stage",
            shares="uniform",
            weights="shares",
            ema_halflife=887_000,  # 0.9999 per iteration of 128 images
            ema_rampup=0.0,
        ),
    )


def cifar10_edm() -> RunConfig:
    """CIFAR-10, Multistage EDM: DDPM++ with encoder 128, decoders 192/128/16, the paper's sigma edges.

    Without EDM's augmentation, which this release does not make yet.
    """
    return RunConfig(
        name="cifar10-edm",
        data=DataConfig(source="", shape=(3, 32, 32)),
        network=NetworkConfig(
            family="ddpmpp",
            encoder_width=128,
            decoder_widths=(192, 128, 16),
            channel_mult=(2, 2, 2),
            blocks_per_level=4,
            attention_factors=(2,),
            dropout=0.13,
        ),
        diffusion=DiffusionConfig(precondition="edm", schedule=EDM(), prior=LogNormal()),
        stages=Stages(PAPER_SIGMA, {"rule": "published", "data_range": [0.0, 1.0], "data": "CIFAR-10"}),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20_000, clip=None),
        training=TrainingConfig(
            steps=400_000, batch=512, update_mode="one-stage", shares="prior", weights="prior", ema_rampup=0.05
        ),
        sampling=SamplingConfig(solver="heun", calls=35, spacing="edm"),
    )


PRESETS: dict[str, Callable[[], RunConfig]] = {
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "cifar10-dpm": cifar10_dpm,
    "cifar10-edm": cifar10_edm,
}


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
