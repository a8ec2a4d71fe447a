"""The run configuration refuses what cannot be trained, naming field and value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from multistage_diffusion.config import (
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
from multistage_diffusion.config.run import FORMAT_VERSION
from multistage_diffusion.errors import UserError
from multistage_diffusion.schedules import LogNormal, UniformTime
from multistage_diffusion.schedules.discrete import Discrete, UniformSteps
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stages import Stages

NAN, INF = math.nan, math.inf

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"held_out": 1.0}, "data.held_out=1.0"),
    (DataConfig, {"held_out": -0.1}, "data.held_out=-0.1"),
    (DataConfig, {"held_out": NAN}, "data.held_out=nan"),
    (DataConfig, {"size": (0, 4)}, "data.size=0x4"),
    (CodecConfig, {"scale": 0.0}, "codec.scale=0.0 must be positive"),
    (CodecConfig, {"shape": (3, 4)}, "codec.shape=[3, 4] must be"),
    (DiffusionConfig, {"sigma_data": 0.0}, "diffusion.sigma_data=0.0"),
    (DiffusionConfig, {"sigma_data": INF}, "diffusion.sigma_data=inf"),
    (DiffusionConfig, {"schedule": EDM()}, "diffusion.schedule='edm': precondition 'vp-eps' needs"),
    (OptimizerConfig, {"lr": 0.0}, "optimizer.lr=0.0"),
    (OptimizerConfig, {"lr": NAN}, "optimizer.lr=nan"),
    (OptimizerConfig, {"lr": INF}, "optimizer.lr=inf"),
    (OptimizerConfig, {"eps": 0.0}, "optimizer.eps=0.0"),
    (OptimizerConfig, {"betas": (0.9, 1.0)}, "optimizer.betas=[0.9, 1.0]"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps=-1"),
    (OptimizerConfig, {"decay_after": -1}, "optimizer.decay_after=-1"),
    (OptimizerConfig, {"weight_decay": -0.1}, "optimizer.weight_decay=-0.1"),
    (OptimizerConfig, {"clip": 0.0}, "optimizer.clip=0.0"),
    (OptimizerConfig, {"clip": INF}, "null for no clipping"),
    (TrainingConfig, {"steps": 0}, "training.steps=0"),
    (TrainingConfig, {"batch": -1}, "training.batch=-1"),
    (TrainingConfig, {"keep_last": 0}, "training.keep_last=0"),
    (TrainingConfig, {"batch": 4, "accumulate": 5}, "training.accumulate=5 must not exceed training.batch=4"),
    (TrainingConfig, {"seed": -1}, "training.seed=-1"),
    (TrainingConfig, {"ema_halflife": 0.0}, "training.ema_halflife=0.0"),
    (TrainingConfig, {"ema_halflife": INF}, "training.ema_halflife=inf"),
    (TrainingConfig, {"ema_rampup": INF}, "training.ema_rampup=inf"),
    (TrainingConfig, {"ema_profiles": (0.05, 0.3)}, "training.ema_profiles=[0.05, 0.3] must be different numbers above 0"),
    (TrainingConfig, {"ema_profiles": (0.0,)}, "training.ema_profiles=[0.0]"),
    (TrainingConfig, {"ema_profiles": (NAN,)}, "training.ema_profiles=[nan]"),
    (TrainingConfig, {"ema_profiles": (0.1, 0.1)}, "training.ema_profiles=[0.1, 0.1]"),
    (TrainingConfig, {"ema_snapshot_every": 0}, "training.ema_snapshot_every=0 must be positive"),
    (TrainingConfig, {"label_dropout": 1.1}, "training.label_dropout=1.1"),
    (TrainingConfig, {"augment": 1.5}, "training.augment=1.5"),
    (TrainingConfig, {"soft_intervals": -0.5}, "training.soft_intervals=-0.5"),
    (TrainingConfig, {"soft_intervals": (0.5, 1.5)}, "training.soft_intervals=[0.5, 1.5]"),
    (RunConfig, {"training": TrainingConfig(soft_intervals=(0.5, 0.5))}, "soft_intervals=[0.5, 0.5] needs one"),
    (TrainingConfig, {"overlap": -0.5}, "training.overlap=-0.5 must be >= 0"),
    (TrainingConfig, {"overlap": INF}, "training.overlap=inf"),
    (TrainingConfig, {"shares": (0.0, 0.0)}, "training.shares=[0.0, 0.0]"),
    (TrainingConfig, {"weights": (1.0, -1.0)}, "training.weights=[1.0, -1.0]"),
    (TrainingConfig, {"weights": (1.0, NAN)}, "training.weights=[1.0, nan]"),
    (TrainingConfig, {"shares": (1.0, INF)}, "training.shares=[1.0, inf]"),
    (SamplingConfig, {"order": 4}, "sampling.order=4"),
    (SamplingConfig, {"calls": 0}, "sampling.calls=0"),
    (SamplingConfig, {"churn": -1.0}, "sampling.churn=-1.0"),
    (SamplingConfig, {"eta": 1.5}, "sampling.eta=1.5"),
    (SamplingConfig, {"guidance": -1.0}, "sampling.guidance=-1.0"),
    (SamplingConfig, {"guidance_interval": (2.0, 1.0)}, r"sampling.guidance_interval=[2.0, 1.0]"),
    (SamplingConfig, {"guidance_interval": (-1.0, 1.0)}, r"sampling.guidance_interval=[-1.0, 1.0]"),
    (SamplingConfig, {"guidance_interval": (0.0, INF)}, r"sampling.guidance_interval=[0.0, inf]"),
    (SamplingConfig, {"threshold": 0.0}, "sampling.threshold=0.0"),
    (SamplingConfig, {"threshold": 1.5}, "sampling.threshold=1.5"),
    (SamplingConfig, {"clip": 0.0}, "sampling.clip=0.0 must be positive"),
    (SamplingConfig, {"clip": 1.0, "threshold": 0.9}, "both bound the images"),
    (SamplingConfig, {"rho": 0.0}, "sampling.rho=0.0"),
    (SamplingConfig, {"sigma_min": 0.0}, "sampling.sigma_min=0.0"),
    (SamplingConfig, {"sigma_max": INF}, "sampling.sigma_max=inf"),
    (SamplingConfig, {"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min=2.0 must be below sampling.sigma_max=1.0"),
    (EvaluationConfig, {"every": -1}, "evaluation.every=-1 must be >= 0"),
    (EvaluationConfig, {"patience": -1}, "evaluation.patience=-1 must be >= 0"),
    (EvaluationConfig, {"seed": -1}, "evaluation.seed=-1 must be >= 0"),
    (EvaluationConfig, {"count": 1}, "evaluation.count=1 must be at least 2"),
    (EvaluationConfig, {"features": ""}, "evaluation.features is empty"),
    (RunConfig, {"format_version": 99}, f"format_version=99: this release reads format {FORMAT_VERSION}"),
    (RunConfig, {"stages": Stages((1.0,))}, "stages: 2 intervals but network.decoder_widths=[128] has 1"),
    (RunConfig, {"training": TrainingConfig(augment=0.1), "codec": CodecConfig(shape=(4, 8, 8))}, "not of latents"),
    (RunConfig, {"training": TrainingConfig(shares=(0.5, 0.5))}, "shares=[0.5, 0.5] needs one number"),
    (RunConfig, {"training": TrainingConfig(weights=(0.5, 0.5))}, "training.weights=[0.5, 0.5] needs one"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "bad", "message"), REFUSED, ids=[f"{c.__name__}-{b}" for c, b, _ in REFUSED])
def test_refused_values_are_named(cls: type, bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        cls(**bad)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def two_stages(edge: float, **diffusion: Any) -> RunConfig:
    return RunConfig(
        stages=Stages((edge,)),
        network=NetworkConfig.of(decoder_widths=(64, 32)),
        diffusion=DiffusionConfig(**diffusion),
    )


def test_a_stage_that_training_noise_never_reaches_is_refused() -> None:
    assert len(two_stages(100.0).stages) == 2  # VP reaches sigma = 152 at t = 1
    with pytest.raises(ValueError, match=r"\[160, inf\) holds no mass of the uniform-time prior"):
        two_stages(160.0)
    with pytest.raises(ValueError, match=r"\[0, 0\.001\) holds no mass"):
        two_stages(0.001)
    with pytest.raises(ValueError, match="uniform-steps"):
        two_stages(100.0, schedule=Discrete(), prior=UniformSteps())
    with pytest.raises(ValueError, match=r"diffusion\.prior\.schedule differs from diffusion\.schedule"):
        two_stages(1.0, schedule=VP(beta_d=10.0))
    assert two_stages(160.0, precondition="edm", schedule=EDM(), prior=LogNormal()).stages.interior == (160.0,)


def test_a_stage_without_rows_must_not_count() -> None:
    stages, network = Stages((1.0,)), NetworkConfig.of(decoder_widths=(16, 16))
    for weights in ("shares", (0.0, 1.0)):
        RunConfig(stages=stages, network=network, training=TrainingConfig(shares=(0.0, 1.0), weights=weights))
    for counted in ("prior", (0.5, 0.5)):
        with pytest.raises(ValueError, match="stage 1 gets no rows but counts"):
            RunConfig(stages=stages, network=network, training=TrainingConfig(shares=(0.0, 1.0), weights=counted))


def test_edges_of_what_is_accepted() -> None:
    DataConfig(held_out=0.0, size=(1, 1))
    NetworkConfig.of(dropout=0.0, encoder_width=4, decoder_widths=(4, 12), attention_factors=())
    NetworkConfig.of(attention_factors=(1, 2, 4, 8))
    NetworkConfig.of(encoder_width=28, decoder_widths=(4,), channel_mult=(1, 2))
    # An encoder's input convolution is as wide as the encoder; a decoder has nothing of its bare width.
    NetworkConfig.of(family="ldm", encoder_width=32, decoder_widths=(16,), channel_mult=(2,), attention_factors=())
    # Only what attends needs whole heads: not a decoder without attention, whatever its width.
    NetworkConfig.of(
        family="ldm", encoder_width=64, decoder_widths=(128, 96), decoder_attention=(True, False), head_channels=64
    )
    OptimizerConfig(betas=(0.0, 0.0), warmup_steps=0, clip=None)
    TrainingConfig(batch=4, accumulate=4, ema_rampup=0.0, label_dropout=1.0, shares=(0.0, 1.0))
    SamplingConfig(sigma_min=0.002, sigma_max=80.0, eta=1.0)
    EvaluationConfig(every=1, count=2, patience=1)


def test_configurations_are_frozen_values() -> None:
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "x"  # type: ignore[misc]
    assert config == RunConfig()
    assert hash(config) == hash(RunConfig())
    assert dataclasses.replace(config, name="x") != config
    assert config.diffusion.prior == UniformTime()


def test_a_schedule_or_density_that_is_not_registered_is_refused() -> None:
    class Own(VP):
        """Would be stored as a VP."""

    class Density(LogNormal):
        kind = "narrow"

    with pytest.raises(
        UserError, match=r"diffusion.schedule=Own: this class is not registered; add it with @SCHEDULES.add"
    ):
        DiffusionConfig(schedule=Own())
    with pytest.raises(UserError, match=r"diffusion.prior=Density: .*@PRIORS.add"):
        DiffusionConfig(prior=Density())
