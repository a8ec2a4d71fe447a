"""Presets of transformers with a decoder of its own depth and width for each stage; none but `digits-uvit` was trained here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..schedules import LogNormal
from ..schedules.discrete import Discrete, UniformSteps
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
    TrainingConfig,
)
from .image_presets import EDGES

# DDPM's steps, on which DiT is trained (Peebles and Xie 2023, 4), and edges at thirds of them
STEPS = Discrete(beta_start=1e-4, beta_end=0.02, steps=1000, spacing="linear")
THIRDS = (333, 667)


def uvit_small_32() -> RunConfig:
    """Images of 32x32: U-ViT-S/2 with three decoders (depths 6/4/2), for a GPU."""
    return RunConfig(
        name="uvit-small-32",
        data=DataConfig(source="", size=(32, 32), fit="crop", shape=(3, 32, 32)),
        network=NetworkConfig.of(
            "uvit",
            encoder_width=512,
            decoder_widths=(512, 384, 256),
            encoder_depth=6,
            decoder_depths=(6, 4, 2),
            head_channels=64,
            size=(32, 32),
        ),
        diffusion=DiffusionConfig(precondition="edm", sigma_data=0.5, schedule=EDM(), prior=LogNormal()),
        stages=Stages(EDGES, {"rule": "timestep"}),
        optimizer=OptimizerConfig(kind="adamw", lr=2e-4, betas=(0.99, 0.999), weight_decay=0.03, warmup_steps=2500),
        training=_training(steps=500_000, batch=128),
    )


def uvit_latent_64() -> RunConfig:
    """Images of 512x512 as 4x64x64 latents: U-ViT-M/4 with three decoders (depths 8/6/3), for a GPU."""
    return _on_latents(
        "uvit-latent-64",
        64,
        NetworkConfig.of(
            "uvit",
            channels=4,
            patch=4,
            encoder_width=768,
            decoder_widths=(768, 512, 384),
            encoder_depth=8,
            decoder_depths=(8, 6, 3),
            head_channels=64,
            size=(64, 64),
        ),
        OptimizerConfig(kind="adamw", lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup_steps=5000),
    )


def dit_b_latent() -> RunConfig:
    """Images of 256x256 as 4x32x32 latents: DiT-B/2, eight shared blocks and three decoders (depths 4/4/2), for a GPU."""
    return _on_latents(
        "dit-b-latent",
        32,
        NetworkConfig.of(
            "dit",
            channels=4,
            patch=2,
            encoder_width=768,
            decoder_widths=(768, 512, 384),
            encoder_depth=8,
            decoder_depths=(4, 4, 2),
            head_channels=64,
            size=(32, 32),
        ),
        OptimizerConfig(kind="adamw", lr=1e-4, weight_decay=0.0, warmup_steps=0),
    )


def _on_latents(name: str, side: int, network: NetworkConfig, optimizer: OptimizerConfig) -> RunConfig:
    """Return a run on latents of a codec that reduces sides by 8: noise prediction on DDPM's 1000 steps."""
    edges = tuple(STEPS.edge_sigma(step) for step in THIRDS)
    return RunConfig(
        name=name,
        data=DataConfig(source="", size=(8 * side, 8 * side), fit="crop", shape=(3, 8 * side, 8 * side)),
        codec=CodecConfig(shape=(4, side, side)),
        network=network,
        diffusion=DiffusionConfig(precondition="vp-eps", schedule=STEPS, prior=UniformSteps(schedule=STEPS)),
        stages=Stages(edges, {"edges_t": list(THIRDS), "schedule": "discrete", "rule": "timestep"}),
        optimizer=optimizer,
        training=_training(steps=400_000, batch=256),
        evaluation=EvaluationConfig(features="thumbnails"),  # pixels are too many
    )


def _training(*, steps: int, batch: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        batch=batch,
        shares="prior",
        floor_share=0.05,
        overlap=0.25,
        ema_halflife=6931.0 * batch,  # 0.9999 per step
        ema_rampup=0.0,
        flip=False,
        log_every=200,
        held_out_every=5000,
        checkpoint_every=5000,
        sample_every=20_000,
    )


def digits_uvit(digits: Callable[[], RunConfig]) -> Callable[[], RunConfig]:
    """Return the preset "digits-uvit", made from the preset "digits"."""

    def made() -> RunConfig:
        """8x8 handwritten digits by a U-ViT with three decoders (depths 2/2/1), minutes on two CPU cores."""
        base = digits()
        return dataclasses.replace(
            base,
            name="digits-uvit",
            network=NetworkConfig.of(
                "uvit",
                channels=1,
                patch=2,
                encoder_width=96,
                decoder_widths=(96, 96, 64),
                encoder_depth=2,
                decoder_depths=(2, 2, 1),
                head_channels=16,
                size=(8, 8),
                init_std=0.09,  # the published 0.02 learns far more slowly at such widths
            ),
            optimizer=OptimizerConfig(kind="adamw", lr=4e-3, betas=(0.9, 0.99), warmup_steps=100, decay_after=1000),
            training=dataclasses.replace(base.training, steps=3600),
        )

    return made


TRANSFORMER_PRESETS: dict[str, Callable[[], RunConfig]] = {
    "dit-b-latent": dit_b_latent,
    "uvit-latent-64": uvit_latent_64,
    "uvit-small-32": uvit_small_32,
}
