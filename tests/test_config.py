"""The run configuration refuses what cannot be trained, naming field and value."""

from __future__ import annotations

import dataclasses
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from multistage_diffusion.config import (
    FORMAT_VERSION,
    DataConfig,
    DiffusionConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
    group_count,
)
from multistage_diffusion.nets import build_network
from multistage_diffusion.schedules import EDM, VP, Discrete, LogNormal, UniformSteps, UniformTime
from multistage_diffusion.stages import Stages

NAN, INF = math.nan, math.inf

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (DataConfig, {"held_out": 1.0}, "data.held_out=1.0"),
    (DataConfig, {"held_out": -0.1}, "data.held_out=-0.1"),
    (DataConfig, {"held_out": NAN}, "data.held_out=nan"),
    (DataConfig, {"size": (0, 4)}, "data.size=(0, 4)"),
    (NetworkConfig, {"channels": 0}, "network.channels=0"),
    (NetworkConfig, {"decoder_widths": ()}, "network.decoder_widths"),
    (NetworkConfig, {"channel_mult": (), "attention_factors": ()}, "network.channel_mult"),
    (NetworkConfig, {"channel_mult": (1, 0)}, "network.channel_mult=[1, 0]"),
    (NetworkConfig, {"channel_mult": (1, -2)}, "network.channel_mult=[1, -2]"),
    (NetworkConfig, {"blocks_per_level": 0}, "network.blocks_per_level=0"),
    (NetworkConfig, {"dropout": 1.0}, "network.dropout=1.0"),
    (NetworkConfig, {"num_classes": -1}, "network.num_classes=-1"),
    (NetworkConfig, {"augment_dim": -1}, "network.augment_dim=-1"),
    (NetworkConfig, {"attention_factors": (3,)}, "attention_factors=[3]: 3 is not a level's downsample factor (1, 2"),
    (NetworkConfig, {"attention_factors": (16,)}, "16 is not"),
    (NetworkConfig, {"encoder_width": 2}, "width 2 must be even and at least 4"),
    (NetworkConfig, {"decoder_widths": (64, 33)}, "width 33 must be even"),
    (NetworkConfig, {"encoder_width": 18}, "width 18 x 1 = 18 channels is not divisible into 4 groups"),
    (NetworkConfig, {"decoder_widths": (68,)}, "use a multiple of 16"),
    (NetworkConfig, {"encoder_width": 40, "decoder_widths": (28,)}, "meet in 68 channels, not divisible into 16"),
    (NetworkConfig, {"encoder_width": 18, "channel_mult": (2,), "attention_factors": ()}, "width 18 x 1 = 18 channels"),
    (NetworkConfig, {"head_channels": 16}, "network.head_channels=16 is a setting of network.family=ldm only; leave"),
    (NetworkConfig, {"family": "ddpmpp", "decoder_attention": (True,)}, "network.decoder_attention=[True] is a setting"),
    (NetworkConfig, {"family": "ldm", "head_channels": 0}, "network.head_channels=0 must be positive"),
    (NetworkConfig, {"family": "ldm", "head_channels": 48}, "network.head_channels=48 does not divide 256 channels"),
    (
        NetworkConfig,
        {"family": "ldm", "head_channels": 64, "decoder_widths": (96,), "channel_mult": (1, 2, 3), "attention_factors": (4,)},
        "network.head_channels=64 does not divide 288 channels that attend; use 32",
    ),
    (NetworkConfig, {"family": "ldm", "decoder_attention": (True, False)}, "decoder_attention=[True, False] needs true"),
    (NetworkConfig, {"family": "ldm", "decoder_attention": ()}, "network.decoder_attention=[] needs true or false for each"),
    (NetworkConfig, {"family": "ldm", "encoder_width": 48}, "48 x 1 = 48 channels is not divisible into 32 groups"),
    (NetworkConfig, {"family": "ldm", "decoder_widths": (80,)}, "GroupNorm; use a multiple of 32"),
    (DiffusionConfig, {"sigma_data": 0.0}, "diffusion.sigma_data=0.0"),
    (DiffusionConfig, {"sigma_data": INF}, "diffusion.sigma_data=inf"),
    (DiffusionConfig, {"schedule": EDM()}, "diffusion.schedule='edm': precondition 'vp-eps' needs"),
    (OptimizerConfig, {"lr": 0.0}, "optimizer.lr=0.0"),
    (OptimizerConfig, {"lr": NAN}, "optimizer.lr=nan"),
    (OptimizerConfig, {"lr": INF}, "optimizer.lr=inf"),
    (OptimizerConfig, {"eps": 0.0}, "optimizer.eps=0.0"),
    (OptimizerConfig, {"betas": (0.9, 1.0)}, "optimizer.betas=(0.9, 1.0)"),
    (OptimizerConfig, {"warmup_steps": -1}, "optimizer.warmup_steps=-1"),
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
    (TrainingConfig, {"label_dropout": 1.1}, "training.label_dropout=1.1"),
    (TrainingConfig, {"shares": (0.0, 0.0)}, "training.shares=[0.0, 0.0]"),
    (TrainingConfig, {"weights": (1.0, -1.0)}, "training.weights=[1.0, -1.0]"),
    (TrainingConfig, {"weights": (1.0, NAN)}, "training.weights=[1.0, nan]"),
    (TrainingConfig, {"shares": (1.0, INF)}, "training.shares=[1.0, inf]"),
    (SamplingConfig, {"order": 4}, "sampling.order=4"),
    (SamplingConfig, {"calls": 0}, "sampling.calls=0"),
    (SamplingConfig, {"churn": -1.0}, "sampling.churn=-1.0"),
    (SamplingConfig, {"eta": 1.5}, "sampling.eta=1.5"),
    (SamplingConfig, {"rho": 0.0}, "sampling.rho=0.0"),
    (SamplingConfig, {"sigma_min": 0.0}, "sampling.sigma_min=0.0"),
    (SamplingConfig, {"sigma_max": INF}, "sampling.sigma_max=inf"),
    (SamplingConfig, {"sigma_min": 2.0, "sigma_max": 1.0}, "sigma_min=2.0 must be below sampling.sigma_max=1.0"),
    (RunConfig, {"format_version": 99}, f"format_version=99: this release reads format {FORMAT_VERSION}"),
    (RunConfig, {"stages": Stages((1.0,))}, "stages: 2 intervals but network.decoder_widths=[128] has 1"),
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
        network=NetworkConfig(decoder_widths=(64, 32)),
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
    stages, network = Stages((1.0,)), NetworkConfig(decoder_widths=(16, 16))
    for weights in ("shares", (0.0, 1.0)):
        RunConfig(stages=stages, network=network, training=TrainingConfig(shares=(0.0, 1.0), weights=weights))
    for counted in ("prior", (0.5, 0.5)):
        with pytest.raises(ValueError, match="stage 1 gets no rows but counts"):
            RunConfig(stages=stages, network=network, training=TrainingConfig(shares=(0.0, 1.0), weights=counted))


def test_edges_of_what_is_accepted() -> None:
    DataConfig(held_out=0.0, size=(1, 1))
    NetworkConfig(dropout=0.0, encoder_width=4, decoder_widths=(4, 12), attention_factors=())
    NetworkConfig(attention_factors=(1, 2, 4, 8))
    NetworkConfig(encoder_width=28, decoder_widths=(4,), channel_mult=(1, 2))
    # An encoder's input convolution is as wide as the encoder; a decoder has nothing of its bare width.
    NetworkConfig(family="ldm", encoder_width=32, decoder_widths=(16,), channel_mult=(2,), attention_factors=())
    # Only what attends needs whole heads: not a decoder without attention, whatever its width.
    NetworkConfig(
        family="ldm", encoder_width=64, decoder_widths=(128, 96), decoder_attention=(True, False), head_channels=64
    )
    OptimizerConfig(betas=(0.0, 0.0), warmup_steps=0, clip=None)
    TrainingConfig(batch=4, accumulate=4, ema_rampup=0.0, label_dropout=1.0, shares=(0.0, 1.0))
    SamplingConfig(sigma_min=0.002, sigma_max=80.0, eta=1.0)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (16, 4), (60, 15), (64, 16), (68, 16), (256, 16)])
def test_group_count(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


@pytest.mark.parametrize("width", [16, 64, 112, 144, 160, 192, 208, 224])
def test_every_width_of_the_paper_is_accepted(width: int) -> None:
    NetworkConfig(encoder_width=width, decoder_widths=(width,))


def test_just_the_widths_that_no_network_can_have_are_refused() -> None:
    rng = random.Random(4)
    outcomes: set[tuple[str, bool]] = set()
    for _ in range(60):
        choice: dict[str, Any] = {
            "family": rng.choice(["ncsnpp", "ddpmpp", "ldm"]),
            "encoder_width": rng.choice([6, 12, 20, 36, 40, 48, 64]),
            "decoder_widths": (rng.choice([6, 12, 20, 28, 48, 64]),),
            "channel_mult": rng.choice([(1,), (2,), (1, 2), (2, 1), (1, 3)]),
            "blocks_per_level": rng.choice([1, 2]),
            "attention_factors": (),
            "separate": rng.random() < 0.2,
        }
        try:
            NetworkConfig(**choice)
            refused = False
        except ValueError:
            refused = True
        unchecked = SimpleNamespace(**{**dataclasses.asdict(NetworkConfig()), **choice})
        try:
            with torch.device("meta"):
                build_network(unchecked)  # type: ignore[arg-type]
            impossible = False
        except ValueError:
            impossible = True
        assert refused == impossible, choice
        outcomes.add((choice["family"], refused))
    assert len(outcomes) == 6


@pytest.mark.parametrize("width", range(4, 140, 2))
def test_the_multiple_the_message_asks_for_is_accepted(width: int) -> None:
    def refusal(candidate: int) -> str:
        try:
            NetworkConfig(encoder_width=candidate, decoder_widths=(candidate,), channel_mult=(1, 2, 3, 5))
        except ValueError as error:
            return str(error)
        return ""

    for _ in range(2):  # a small width may be refused once more, at a deeper level
        message = refusal(width)
        if message:
            multiple = int(message.rsplit(" ", 1)[1])
            width = -(-width // multiple) * multiple
    assert refusal(width) == ""


def test_configurations_are_frozen_values() -> None:
    config = RunConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.name = "x"  # type: ignore[misc]
    assert config == RunConfig()
    assert hash(config) == hash(RunConfig())
    assert dataclasses.replace(config, name="x") != config
    assert config.diffusion.prior == UniformTime()
