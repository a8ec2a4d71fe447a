"""What import and export of published checkpoints share: the layout of a network, and names in a file."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..config import NetworkConfig, RunConfig
from ..nets.blocks import group_count
from ..nets.ldm import LDMConfig
from ..nets.network import meta_network
from ..nets.song import SongUNetConfig
from ..schedules.discrete import Discrete
from ..schedules.vp import VP
from ..training.checkpoint import trained_config
from ..training.run import Run

PREFIX = "network."  # of the tensor names of a denoiser


def exported_config(run: Run, checkpoint: str) -> RunConfig:
    """Return the configuration with which a checkpoint is exported: that of its training, with the run's sampler of today.

    Args:
        run: the run.
        checkpoint: "best", "latest" or a step.

    Raises:
        UserError: if there is no such checkpoint, or it is damaged.
    """
    return dataclasses.replace(trained_config(run.checkpoint(checkpoint)), sampling=run.config().sampling)


def layout_of(config: RunConfig) -> str:
    """Return the family in whose published layout a run's weights keep their meaning; "" if there is none."""
    family, diffusion = config.network.family, config.diffusion
    schedule = diffusion.schedule
    if config.network.separate or (config.codec.used and family != "ldm") or _varied(config.network):
        return ""
    if diffusion.precondition == "edm":
        return family if family == "ddpmpp" else ""
    if diffusion.precondition != "vp-eps":
        return ""
    published = isinstance(schedule, VP) and (schedule.beta_d, schedule.beta_min) == (VP.beta_d, VP.beta_min)
    kind = "ncsnpp" if published else "ldm" if isinstance(schedule, Discrete) else ""
    return family if family == kind else ""


def _varied(network: NetworkConfig) -> bool:
    """Return whether an LDM U-Net has settings that latent diffusion's own code does not have."""
    free = ("head_channels", "decoder_attention", "channel_mult", "blocks_per_level", "attention_factors")
    if not isinstance(network, LDMConfig) or network.head_channels is None:
        return isinstance(network, LDMConfig)
    own = [
        f
        for f in dataclasses.fields(LDMConfig)
        if f.name not in {*(g.name for g in dataclasses.fields(NetworkConfig)), *free}
    ]
    return any(getattr(network, f.name) != f.default for f in own)


def betas_of(schedule: Discrete) -> Tensor:
    """Return beta of every step, float64 (steps,): alpha_bar = 1/(1 + sigma²) is the product of 1 - beta."""
    kept = torch.sigmoid(-2.0 * schedule.log_sigmas)
    return 1.0 - kept / torch.cat([kept.new_ones(1), kept[:-1]])


def regrouped(network: SongUNetConfig, most: int) -> int:
    """Return how many GroupNorms of a network would have another number of groups with at most `most` of them."""
    norms = [module for module in meta_network(network).modules() if isinstance(module, nn.GroupNorm)]
    return sum(norm.num_groups != group_count(norm.num_channels, most) for norm in norms)
