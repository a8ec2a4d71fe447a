"""Weights of diffusers' UNet2DModel, to and from the LDM U-Net; `unet2d_config` has its settings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from ..nets.ldm import LDMConfig
from ..nets.network import meta_network
from .parts import weight

_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names before diffusers 0.18
_LABELS = "encoders.0.embedding.label.weight"  # (4 width, classes); an nn.Embedding (classes, 4 width) in UNet2DModel


@dataclass(frozen=True)
class _Attention:
    """Where the q, k and v of an attention are, and its channels of a head (None: one head)."""

    theirs: str
    ours: str
    head_channels: int | None


def unet2d_state(tensors: Mapping[str, Tensor], config: LDMConfig) -> dict[str, Tensor]:
    """Return a UNet2DModel's weights as the state dict of a one-stage network, float32.

    Raises:
        UserError: naming the first tensor that is missing, unexpected or of another shape.
    """
    tensors = {_current_name(name): value for name, value in tensors.items()}
    absent = [f"{theirs}.conv1.weight" for theirs, _ in _blocks(config) if f"{theirs}.conv1.weight" not in tensors]
    if absent:  # before thousands of blocks are built that only config.json has
        raise UserError(f"has no {absent[0]}")
    needed, state = meta_network(config).state_dict(), {}
    for theirs, ours in _names(config).items():
        if ours == _LABELS and ours in needed:
            state[ours] = _popped(tensors, theirs, needed[ours].t()).t()
        elif ours in needed:
            state[ours] = _popped(tensors, theirs, needed[ours])
    for a in _attentions(config):
        for kind in ("weight", "bias"):
            fused = needed[f"{a.ours}.qkv.{kind}"]
            thirds = [_popped(tensors, f"{a.theirs}.to_{letter}.{kind}", fused[: len(fused) // 3]) for letter in "qkv"]
            state[f"{a.ours}.qkv.{kind}"] = _by_head(thirds, a.head_channels)
    if tensors:
        raise UserError(f"{next(iter(tensors))}: no weight of this network ({len(tensors)} unexpected)")
    return {name: state[name].contiguous() for name in needed}


def _popped(tensors: dict[str, Tensor], name: str, needed: Tensor) -> Tensor:
    """Take a weight out of tensors, as float32; raise UserError if it is not there, or unlike the one that is needed."""
    found = tensors.pop(name, None)
    if found is None:
        raise UserError(f"has no {name}")
    if _is_projection(name) and found.ndim == 4:  # 1x1 convolutions in older files
        found = found.flatten(1)
    if found.shape != needed.shape:
        raise UserError(f"{name} has shape {list(found.shape)}, not {list(needed.shape)}")
    return weight(name, found)


def unet2d_tensors(state: Mapping[str, Tensor], config: LDMConfig) -> dict[str, Tensor]:
    """Return the weights of a UNet2DModel for a one-stage network's state dict: the inverse of `unet2d_state`."""
    tensors = {theirs: state[ours] for theirs, ours in _names(config).items() if ours in state}
    if config.num_classes:
        tensors["class_embedding.weight"] = state[_LABELS].t()
    for a in _attentions(config):
        for kind in ("weight", "bias"):
            fused = state[f"{a.ours}.qkv.{kind}"]
            heads = fused.reshape(-1, 3, a.head_channels or len(fused) // 3, *fused.shape[1:])
            for i, letter in enumerate("qkv"):
                tensors[f"{a.theirs}.to_{letter}.{kind}"] = heads[:, i].flatten(0, 1)
    return {name: value.contiguous() for name, value in tensors.items()}


def _current_name(name: str) -> str:
    """Return the present name of a weight of an attention, whose layers had others in older files."""
    parent, _, kind = name.rpartition(".")
    attention, _, layer = parent.rpartition(".")
    return f"{attention}.{_ATTENTION[layer]}.{kind}" if layer in _ATTENTION else name


def _is_projection(name: str) -> bool:
    return ".attentions." in name and name.endswith(".weight")


def _by_head(thirds: Sequence[Tensor], head_channels: int | None) -> Tensor:
    """Fuse q, k and v: for each head its rows of q, then k, then v."""
    heads = [third.reshape(-1, head_channels or len(third), *third.shape[1:]) for third in thirds]
    return torch.stack(heads, dim=1).flatten(0, 2)


def _attentions(config: LDMConfig) -> Iterator[_Attention]:
    for theirs, ours in _blocks(config):
        place, _, number = theirs.rpartition(".")
        if _has_attention(config, ours):
            attention = f"{place.removesuffix('.resnets')}.attentions.{number}"
            yield _Attention(attention, f"{ours}.attention", config.head_channels)


def _has_attention(config: LDMConfig, ours: str) -> bool:
    if ".middle." in ours:
        return ours.endswith("block0") and config.middle_attention != "none"
    level = int(ours.split(".")[3])
    if ours.startswith("decoders"):
        return config.attends(len(config.channel_mult) - 1 - level) and config.decoder_attends(0)
    return config.attends(level)


def _blocks(config: LDMConfig) -> Iterator[tuple[str, str]]:
    """Yield (name in UNet2DModel, our name) of every residual block."""
    for level in range(len(config.channel_mult)):
        for i in range(config.blocks_per_level):
            yield f"down_blocks.{level}.resnets.{i}", f"encoders.0.levels.{level}.{i}"
        for i in range(config.blocks_per_level + 1):
            yield f"up_blocks.{level}.resnets.{i}", f"decoders.0.levels.{level}.{i}"
    for i in range(2):
        yield f"mid_block.resnets.{i}", f"encoders.0.middle.block{i}"


def _names(config: LDMConfig) -> dict[str, str]:
    """Return {name in UNet2DModel: our name} of all weights but q, k and v; some are of layers that a network lacks."""
    encoder, decoder = "encoders.0", "decoders.0"
    modules = {
        "time_embedding.linear_1": f"{encoder}.embedding.linear0",
        "time_embedding.linear_2": f"{encoder}.embedding.linear1",
        "conv_in": f"{encoder}.conv_in",
        "conv_norm_out": f"{decoder}.norm_out",
        "conv_out": f"{decoder}.conv_out",
    }
    for level in range(len(config.channel_mult) - 1):
        modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"{encoder}.downs.{level}"
        modules[f"up_blocks.{level}.upsamplers.0.conv"] = f"{decoder}.ups.{level}.1"
    layers = {
        "norm1": "norm0",
        "conv1": "conv0",
        "time_emb_proj": "affine",
        "norm2": "norm1",
        "conv2": "conv1",
        "conv_shortcut": "skip",
    }
    for theirs, ours in _blocks(config):
        modules |= {f"{theirs}.{a}": f"{ours}.{b}" for a, b in layers.items()}
    for a in _attentions(config):
        modules[f"{a.theirs}.group_norm"] = f"{a.ours}.norm"
        modules[f"{a.theirs}.to_out.0"] = f"{a.ours}.proj"
    names = {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}
    return {**names, "class_embedding.weight": _LABELS}
