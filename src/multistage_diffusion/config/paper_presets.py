"""The paper's networks as run configurations, each with its published training settings.

Source: "Improving Training Efficiency of Diffusion Models via Multi-Stage Framework and Tailored Multi-Decoder
Architecture" (CVPR 2024), Tables 5, 7, 8 and 9 and appendix B. Widths are recovered from the printed parameter counts,
except those of MEME and of the separate networks, which are chosen here.
None has a data source: `msdiff train --preset NAME --data DATA`. A tenth of the images is held out unless data.held_out
is set.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ..schedules import LogNormal
from ..schedules.discrete import Discrete, UniformSteps
from ..schedules.edm import EDM
from ..schedules.vp import VP
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

# The published cuts: Algorithm 1 (three stages) and 2 (others) on CIFAR-10 in [0, 1], reused by the paper for networks
# trained on [-1, 1].
EDGES_T: dict[int, tuple[float, ...]] = {
    1: (),
    2: (0.476,),
    3: (0.442, 0.631),
    4: (0.376, 0.526, 0.726),
    5: (0.376, 0.476, 0.626, 0.776),
}
# The second value is kept as printed, although it belongs to t = 0.636 (0.631 gives 7.414).
EDGES_SIGMA = (2.5103, 7.6577)
EDGES_STEP = (442, 631)  # of LDM's 1000 steps: sigma 2.149 and 5.301, unlike those of VP
# The paper samples with the solvers as published, whose last state still contains noise.
PUBLISHED = SamplingConfig(lower_final="published", denoise_last="never", third_order="published")
CUT_ON = {"rule": "published", "data_range": [0.0, 1.0], "data": "CIFAR-10"}


def vp_stages(edges_t: tuple[float, ...], **origin: Any) -> Stages:
    """Return stages cut at VP times."""
    return Stages(tuple(VP().edge_sigma(t) for t in edges_t), {"edges_t": list(edges_t), "schedule": "vp", **origin})


def _dpm(name: str, encoder: int, decoders: tuple[int, ...]) -> RunConfig:
    """NCSN++ on CIFAR-10 with VP eps-prediction, one stage drawn per step, sampled by DPM-Solver in 20 calls."""
    return RunConfig(
        name=name,
        data=DataConfig(source="", shape=(3, 32, 32)),
        network=NetworkConfig.of(
            "ncsnpp",
            encoder_width=encoder,
            decoder_widths=decoders,
            channel_mult=(1, 2, 2, 2),
            blocks_per_level=8,
            attention_factors=(2,),
            dropout=0.1,
        ),
        diffusion=DiffusionConfig(precondition="vp-eps"),
        stages=vp_stages(EDGES_T[len(decoders)], **CUT_ON) if len(decoders) > 1 else Stages(),
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
        sampling=PUBLISHED,
    )


def cifar10_dpm() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++, encoder 128, decoders 192/128/16 (Table 7, row 1; Table 9, n = 3)."""
    return _dpm("cifar10-dpm", 128, (192, 128, 16))


def cifar10_dpm_table7_2() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++, encoder 160, decoders 160/128/16 (Table 7, row 2)."""
    return _dpm("cifar10-dpm-table7-2", 160, (160, 128, 16))


def cifar10_dpm_table7_3() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++, encoder 192, decoders 144/112/16 (Table 7, row 3)."""
    return _dpm("cifar10-dpm-table7-3", 192, (144, 112, 16))


def cifar10_dpm_table7_4() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++, encoder 192, decoders 128/64/16 (Table 7, row 4)."""
    return _dpm("cifar10-dpm-table7-4", 192, (128, 64, 16))


def cifar10_dpm_one_stage() -> RunConfig:
    """CIFAR-10, DPM-Solver baseline: NCSN++, one stage of width 128 (Table 9, n = 1), GroupNorm as in score_sde's code."""
    return _original_groups(_dpm("cifar10-dpm-one-stage", 128, (128,)))


def _original_groups(config: RunConfig) -> RunConfig:
    """Return a baseline with up to 32 groups in a GroupNorm, as its own code has; the multi-stage code has 16."""
    groups: dict[str, Any] = {"norm_groups": 32}
    return dataclasses.replace(config, network=dataclasses.replace(config.network, **groups))


def cifar10_dpm_two_stages() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++, encoder 128, decoders 160/112 (Table 9, n = 2)."""
    return _dpm("cifar10-dpm-two-stages", 128, (160, 112))


def cifar10_dpm_four_stages() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++, encoder 96, decoders 208/144/112/32 (Table 9, n = 4)."""
    return _dpm("cifar10-dpm-four-stages", 96, (208, 144, 112, 32))


def cifar10_dpm_five_stages() -> RunConfig:
    """CIFAR-10, Multistage DPM-Solver: NCSN++, encoder 64, decoders 224/160/160/64/48 (Table 9, n = 5)."""
    return _dpm("cifar10-dpm-five-stages", 64, (224, 160, 160, 64, 48))


def cifar10_dpm_separate() -> RunConfig:
    """CIFAR-10, DPM-Solver without sharing: three separate NCSN++ of widths 192/128/16 on the stages of cifar10-dpm.

    The widths are chosen here: a stage's network has the width of its published decoder throughout, so that stage 2 is
    the one-stage baseline with the groups of the multi-stage code.
    """
    return _separate("cifar10-dpm-separate", cifar10_dpm())


def _separate(name: str, shared: RunConfig) -> RunConfig:
    return dataclasses.replace(shared, name=name, network=dataclasses.replace(shared.network, separate=True))


def cifar10_meme() -> RunConfig:
    """CIFAR-10, MEME baseline (Table 5): four separate iU-Nets of width 128 on equal intervals of t.

    Published: four experts on equal intervals, soft intervals; in the comparison, 600k iterations in total and 13.08
    GFLOPs. Chosen here: depth and width, for a mean of 13.06 GFLOPs over the experts; the share of attention, equal to
    the middle of an expert's interval; everything else, as for the DPM-Solver networks. The soft intervals are those
    reported for MEME.
    """
    base = _dpm("cifar10-meme", 128, (128,) * 4)
    return dataclasses.replace(
        base,
        network=NetworkConfig.of(
            "meme",
            decoder_widths=base.network.decoder_widths,
            separate=True,
            channel_mult=(1, 2, 2, 2),
            blocks_per_level=5,
            attention_factors=(1, 2, 4, 8),
            attention_shares=(0.125, 0.375, 0.625, 0.875),
            dropout=base.network.dropout,
        ),
        stages=vp_stages((0.25, 0.5, 0.75), rule="uniform in t"),
        training=dataclasses.replace(base.training, steps=600_000, soft_intervals=(0.2, 0.6, 0.8, 0.9)),
    )


def cifar10_edm() -> RunConfig:
    """CIFAR-10, Multistage EDM: DDPM++, encoder 128, decoders 192/128/16, the paper's sigma edges.

    With EDM's augmentation; sampled by Heun in 35 calls.
    """
    return RunConfig(
        name="cifar10-edm",
        data=DataConfig(source="", shape=(3, 32, 32)),
        network=NetworkConfig.of(
            "ddpmpp",
            encoder_width=128,
            decoder_widths=(192, 128, 16),
            channel_mult=(2, 2, 2),
            blocks_per_level=4,
            attention_factors=(2,),
            dropout=0.13,
            augment_dim=9,
        ),
        diffusion=DiffusionConfig(precondition="edm", schedule=EDM(), prior=LogNormal()),
        stages=Stages(EDGES_SIGMA, CUT_ON),
        optimizer=OptimizerConfig(lr=1e-3, warmup_steps=20_000, clip=None),
        training=TrainingConfig(
            steps=400_000,
            batch=512,
            update_mode="one-stage",
            shares="prior",
            weights="prior",
            ema_rampup=0.05,
            augment=0.12,
        ),
        sampling=dataclasses.replace(PUBLISHED, solver="heun", calls=35, spacing="edm"),
    )


def cifar10_edm_one_stage() -> RunConfig:
    """CIFAR-10, EDM baseline: DDPM++, one stage of width 128, GroupNorm as in EDM's code."""
    multistage = cifar10_edm()
    one = dataclasses.replace(
        multistage,
        name="cifar10-edm-one-stage",
        network=dataclasses.replace(multistage.network, decoder_widths=(128,)),
        stages=Stages(),
    )
    return _original_groups(one)


def cifar10_edm_separate() -> RunConfig:
    """CIFAR-10, EDM without sharing: three separate DDPM++ of widths 192/128/16 on the stages of cifar10-edm.

    Widths are chosen as in cifar10-dpm-separate.
    """
    return _separate("cifar10-edm-separate", cifar10_edm())


def celeba32_edm() -> RunConfig:
    """CelebA at 32x32, Multistage EDM: the network, edges and training settings of cifar10-edm.

    The edges are CIFAR-10's, as in the paper; `msdiff stages` finds those of CelebA.
    """
    return dataclasses.replace(cifar10_edm(), name="celeba32-edm")


def _ldm(name: str, encoder: int, decoders: tuple[int, ...]) -> RunConfig:
    """LDM's U-Net on latents of CelebA-HQ 256 (VQ-f4: 3 x 64 x 64), eps-prediction on 1000 discrete steps.

    The paper gives schedule, edges and 500k iterations; batch, rate and EMA are those published with LDM for CelebA-HQ
    (Rombach et al. 2022). DDIM in 20 steps makes the 8/4/8 calls with which Table 8 weights its means.
    """
    schedule = Discrete()
    edges = EDGES_STEP if len(decoders) > 1 else ()
    origin = {"edges_t": list(edges), "schedule": "discrete", **CUT_ON}
    return RunConfig(
        name=name,
        data=DataConfig(source="", shape=(3, 256, 256)),
        codec=CodecConfig(source="hf:CompVis/ldm-celebahq-256", subfolder="vqvae", scale=1.0, shape=(3, 64, 64)),
        evaluation=EvaluationConfig(features="thumbnails"),  # pixels are too many
        network=NetworkConfig.of(
            "ldm",
            encoder_width=encoder,
            decoder_widths=decoders,
            channel_mult=(1, 2, 3, 4),
            blocks_per_level=2,
            attention_factors=(2, 4, 8),
            head_channels=32,
            # The published counts require this: the noisier decoders have no attention.
            decoder_attention=tuple(k == 0 for k in range(len(decoders))),
            dropout=0.0,
        ),
        diffusion=DiffusionConfig(precondition="vp-eps", schedule=schedule, prior=UniformSteps(schedule=schedule)),
        stages=Stages(tuple(schedule.edge_sigma(t) for t in edges), origin) if edges else Stages(),
        optimizer=OptimizerConfig(kind="adamw", lr=9.6e-5, weight_decay=0.01, warmup_steps=0, clip=None),
        training=TrainingConfig(
            steps=500_000,
            batch=48,
            update_mode="one-stage",
            shares="uniform",
            weights="shares",
            ema_halflife=332_700,  # 0.9999 per iteration of 48 images
            ema_rampup=0.0,
            flip=False,  # as LDM trains on CelebA-HQ
        ),
        sampling=dataclasses.replace(PUBLISHED, solver="ddim", calls=20, spacing="time"),
    )


def celebahq_ldm() -> RunConfig:
    """CelebA-HQ 256 latents, Multistage LDM: encoder 224, decoders 256/192/128 (Table 8, row 4, the paper's choice)."""
    return _ldm("celebahq-ldm", 224, (256, 192, 128))


def celebahq_ldm_table8_1() -> RunConfig:
    """CelebA-HQ 256 latents, Multistage LDM: encoder 192, decoders 224/192/160 (Table 8, row 1)."""
    return _ldm("celebahq-ldm-table8-1", 192, (224, 192, 160))


def celebahq_ldm_table8_2() -> RunConfig:
    """CelebA-HQ 256 latents, Multistage LDM: encoder 160, decoders 224/192/128 (Table 8, row 2)."""
    return _ldm("celebahq-ldm-table8-2", 160, (224, 192, 128))


def celebahq_ldm_table8_3() -> RunConfig:
    """CelebA-HQ 256 latents, Multistage LDM: encoder 224, decoders 224/192/128 (Table 8, row 3)."""
    return _ldm("celebahq-ldm-table8-3", 224, (224, 192, 128))


def celebahq_ldm_one_stage() -> RunConfig:
    """CelebA-HQ 256 latents, LDM baseline: one stage of width 224."""
    return _ldm("celebahq-ldm-one-stage", 224, (224,))


PAPER_PRESETS: dict[str, Callable[[], RunConfig]] = {
    "cifar10-dpm": cifar10_dpm,
    "cifar10-edm": cifar10_edm,
    "cifar10-dpm-table7-2": cifar10_dpm_table7_2,
    "cifar10-dpm-table7-3": cifar10_dpm_table7_3,
    "cifar10-dpm-table7-4": cifar10_dpm_table7_4,
    "cifar10-dpm-one-stage": cifar10_dpm_one_stage,
    "cifar10-dpm-two-stages": cifar10_dpm_two_stages,
    "cifar10-dpm-four-stages": cifar10_dpm_four_stages,
    "cifar10-dpm-five-stages": cifar10_dpm_five_stages,
    "cifar10-dpm-separate": cifar10_dpm_separate,
    "cifar10-meme": cifar10_meme,
    "cifar10-edm-one-stage": cifar10_edm_one_stage,
    "cifar10-edm-separate": cifar10_edm_separate,
    "celeba32-edm": celeba32_edm,
    "celebahq-ldm": celebahq_ldm,
    "celebahq-ldm-table8-1": celebahq_ldm_table8_1,
    "celebahq-ldm-table8-2": celebahq_ldm_table8_2,
    "celebahq-ldm-table8-3": celebahq_ldm_table8_3,
    "celebahq-ldm-one-stage": celebahq_ldm_one_stage,
}
