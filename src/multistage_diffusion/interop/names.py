"""Mapping between published parameter names of each family and ours, from the network's configuration.

A multi-decoder network has the names of the multi-stage code (`en_modules`, `de_modules.STAGE`, `model.decs.STAGE`,
`outs.STAGE`). A network with one decoder has those of the family's own code (`all_modules`, `model.dec`,
`output_blocks`). The names are in the order of the published module's parameters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..config import NetworkConfig
from ..errors import UserError
from ..nets.ddpmpp import DDPMppConfig
from ..nets.ldm import LDMConfig
from ..nets.ncsnpp import NCSNppConfig
from ..nets.unet import UNetConfig


@dataclass(frozen=True)
class Target:
    """Our parameter for a published tensor, and the conversion between them.

    Attributes:
        name: our parameter.
        transposed: published (in, out), ours (out, in).
        ones: trailing dimensions of size 1 of a published 1x1 convolution; ours is linear.
        interleaved: published rows in the order (channel, qkv), ours (qkv, channel).
        third: 0, 1, 2 if the published tensor holds only the q, k or v rows of ours.
    """

    name: str
    transposed: bool = False
    ones: int = 0
    interleaved: bool = False
    third: int | None = None

    def convert(self, value: Tensor) -> Tensor:
        """Return the published tensor in our layout."""
        value = value.reshape(value.shape[: value.ndim - self.ones])
        if self.interleaved:
            value = value.reshape(-1, 3, *value.shape[1:]).transpose(0, 1).flatten(0, 1)
        return value.t() if self.transposed else value

    def restore(self, value: Tensor) -> Tensor:
        """Return our tensor in the published layout."""
        if self.third is not None:
            value = value.chunk(3)[self.third]
        if self.transposed:
            value = value.t()
        if self.interleaved:
            value = value.reshape(3, -1, *value.shape[1:]).transpose(0, 1).flatten(0, 1)
        return value.reshape(*value.shape, *[1] * self.ones)


def convert_published(published: Mapping[str, Tensor], names: Mapping[str, Target]) -> dict[str, Tensor]:
    """Return our state dict; `published` must contain every name of the mapping."""
    state: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor]] = {}
    for theirs, target in names.items():
        value = target.convert(published[theirs])
        if target.third is None:
            state[target.name] = value
        else:
            thirds.setdefault(target.name, [value] * 3)[target.third] = value
    return state | {name: torch.cat(values) for name, values in thirds.items()}


def restore_published(state: Mapping[str, Tensor], names: Mapping[str, Target]) -> dict[str, Tensor]:
    """Return the published tensors for our state dict: the inverse of `convert_published`."""
    return {theirs: target.restore(state[target.name]).contiguous() for theirs, target in names.items()}


def published_names(config: NetworkConfig, size: tuple[int, int]) -> dict[str, Target]:
    """Return {published name: ours} of a network for images (or latents) of size (height, width).

    Raises:
        UserError: if no published layout can represent the network.
    """
    for name in ("separate", *(() if isinstance(config, DDPMppConfig) else ("num_classes", "augment_dim"))):
        if getattr(config, name):
            raise UserError(
                f"network.{name}={getattr(config, name)}: the published layout of family {config.family!r} has no place for "
                "it; this run cannot be exported"
            )
    if isinstance(config, NCSNppConfig):
        return ncsnpp_names(config)
    if isinstance(config, LDMConfig):
        return ldm_names(config)
    if not isinstance(config, DDPMppConfig):
        raise UserError(f"network.family={config.family!r} has no published layout; this run cannot be exported")
    height, width = size
    if height != width or height % config.multiple:
        raise UserError(
            f"size={height} x {width}: EDM's names carry the resolution of square images, whole at each of the "
            f"{len(config.channel_mult)} levels; this run cannot be exported"
        )
    return edm_names(config, height)


def is_buffer(name: str) -> bool:
    """Return whether a published tensor is a constant buffer: not learnt and determined by the configuration."""
    return name == "sigmas" or name.endswith("resample_filter")


def dotless(name: str) -> str:
    """Return the name of a U-Net parameter in latent diffusion's EMA (LitEma)."""
    return f"diffusion_model.{name}".replace(".", "")


def _weight_and_bias(theirs: str, ours: str) -> Iterator[tuple[str, Target]]:
    for kind in ("weight", "bias"):
        yield f"{theirs}.{kind}", Target(f"{ours}.{kind}")


def _widens(config: UNetConfig, stage: int, i: int, j: int) -> bool:
    """Return whether a decoder block's input [h, skip] and output differ in width; then the block has a 1x1 skip.

    At the bottom of a decoder twice as wide as the encoder, the widths are equal.
    """
    width, encoder = config.decoder_widths[stage], config.encoder_width
    mults = config.channel_mult[::-1]
    above = encoder * mults[0] if i == 0 else width * mults[i - 1]
    skip = encoder * (mults[i] if j < config.blocks_per_level else (*mults, 1)[i + 1])
    return (width * mults[i] if j else above) + skip != width * mults[i]


# --- NCSN++: `en_modules.i` and `de_modules.stage.i`, or `all_modules.i` for both, in the order of the forward pass.

Module = tuple[str, Literal["plain", "block", "block+skip", "attention", "pyramid"]]


def ncsnpp_names(config: NCSNppConfig) -> dict[str, Target]:
    """Return {published name: ours} of an NCSN++ without class labels."""
    if len(config.decoder_widths) == 1:
        modules = itertools.chain(_ncsnpp_encoder_modules(config), _ncsnpp_decoder_modules(config, 0))
        return dict(_numbered("all_modules", modules))
    names = dict(_numbered("en_modules", _ncsnpp_encoder_modules(config)))
    for k in range(len(config.decoder_widths)):
        names |= dict(_numbered(f"de_modules.{k}", _ncsnpp_decoder_modules(config, k)))
    return names


def _ncsnpp_encoder_modules(config: NCSNppConfig) -> Iterator[Module]:
    ours, width = "encoders.0", 1
    yield from ((f"{ours}.embedding.linear0", "plain"), (f"{ours}.embedding.linear1", "plain"))
    yield f"{ours}.conv_in", "plain"
    for level, mult in enumerate(config.channel_mult):
        if level:
            yield f"{ours}.downs.{level - 1}", "block+skip"
            yield f"{ours}.pyramid.{level - 1}.conv", "pyramid"
        for i in range(config.blocks_per_level):
            block = f"{ours}.levels.{level}.blocks.{i}"
            yield block, "block+skip" if mult != width else "block"
            width = mult
            if 2**level in config.attention_factors:
                yield f"{block}.attention", "attention"
    yield from ((f"{ours}.bottom.block0", "block"), (f"{ours}.bottom.block0.attention", "attention"))
    yield f"{ours}.bottom.block1", "block"


def _ncsnpp_decoder_modules(config: NCSNppConfig, stage: int) -> Iterator[Module]:
    ours, levels = f"decoders.{stage}", len(config.channel_mult)
    for i in range(levels):
        block = ""
        for j in range(config.blocks_per_level + 1):
            block = f"{ours}.levels.{i}.blocks.{j}"
            yield block, "block+skip" if _widens(config, stage, i, j) else "block"
        if 2 ** (levels - 1 - i) in config.attention_factors:
            yield f"{block}.attention", "attention"
        if i < levels - 1:
            yield f"{ours}.ups.{i}", "block+skip"
    yield from ((f"{ours}.norm_out", "plain"), (f"{ours}.conv_out", "plain"))


def _numbered(theirs: str, modules: Iterator[Module]) -> Iterator[tuple[str, Target]]:
    for i, (ours, kind) in enumerate(modules):
        published = f"{theirs}.{i}"
        if kind == "plain":
            yield from _weight_and_bias(published, ours)
        elif kind == "pyramid":
            yield from _weight_and_bias(f"{published}.Conv2d_0", ours)
        elif kind == "attention":
            yield from _ncsnpp_attention(published, ours)
        else:
            yield from _ncsnpp_block(published, ours, skip=kind == "block+skip")


def _ncsnpp_block(theirs: str, ours: str, *, skip: bool) -> Iterator[tuple[str, Target]]:
    pairs = {"GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "affine", "GroupNorm_1": "norm1", "Conv_1": "conv1"}
    for a, b in (pairs | ({"Conv_2": "skip"} if skip else {})).items():
        yield from _weight_and_bias(f"{theirs}.{a}", f"{ours}.{b}")


def _ncsnpp_attention(theirs: str, ours: str) -> Iterator[tuple[str, Target]]:
    yield from _weight_and_bias(f"{theirs}.GroupNorm_0", f"{ours}.norm")
    for third in range(3):
        yield f"{theirs}.NIN_{third}.W", Target(f"{ours}.qkv.weight", transposed=True, third=third)
        yield f"{theirs}.NIN_{third}.b", Target(f"{ours}.qkv.bias", third=third)
    yield f"{theirs}.NIN_3.W", Target(f"{ours}.proj.weight", transposed=True)
    yield f"{theirs}.NIN_3.b", Target(f"{ours}.proj.bias")


# --- EDM's DDPM++: names contain the resolution; decoders are `model.decs.stage`, a single decoder is `model.dec`.


def edm_names(config: DDPMppConfig, resolution: int) -> dict[str, Target]:
    """Return {published name: ours} of an EDM network for square images of the given resolution."""
    names: dict[str, Target] = {}
    if config.num_classes:
        names |= dict(_weight_and_bias("model.map_label", "encoders.0.embedding.label"))
    if config.augment_dim:
        names["model.map_augment.weight"] = Target("encoders.0.embedding.augment.weight")
    for i in (0, 1):
        names |= dict(_weight_and_bias(f"model.map_layer{i}", f"encoders.0.embedding.linear{i}"))
    names |= dict(_weight_and_bias(f"model.enc.{resolution}x{resolution}_conv", "encoders.0.conv_in"))
    names |= dict(_edm_encoder_blocks(config, resolution))
    for k in range(len(config.decoder_widths)):
        names |= dict(_edm_decoder(config, k, resolution))
    return names


def _edm_encoder_blocks(config: DDPMppConfig, resolution: int) -> Iterator[tuple[str, Target]]:
    width = 1
    for level, mult in enumerate(config.channel_mult):
        theirs, ours = f"model.enc.{resolution >> level}x{resolution >> level}", "encoders.0"
        if level:
            yield from _edm_block(f"{theirs}_down", f"{ours}.downs.{level - 1}", skip=True)
        attention = 2**level in config.attention_factors
        for i in range(config.blocks_per_level):
            block = f"{ours}.levels.{level}.blocks.{i}"
            yield from _edm_block(f"{theirs}_block{i}", block, skip=mult != width, attention=attention)
            width = mult


def _edm_decoder(config: DDPMppConfig, stage: int, resolution: int) -> Iterator[tuple[str, Target]]:
    ours, levels, last = f"decoders.{stage}", len(config.channel_mult), config.blocks_per_level
    prefix = "model.dec" if len(config.decoder_widths) == 1 else f"model.decs.{stage}"
    for i in range(levels):
        size = resolution >> (levels - 1 - i)
        theirs = f"{prefix}.{size}x{size}"
        if i:
            yield from _edm_block(f"{theirs}_up", f"{ours}.ups.{i - 1}", skip=True)
        else:
            yield from _edm_block(f"{theirs}_in0", f"{ours}.bottom.block0", attention=True)
            yield from _edm_block(f"{theirs}_in1", f"{ours}.bottom.block1")
        attends = 2 ** (levels - 1 - i) in config.attention_factors
        for j in range(last + 1):
            block = f"{ours}.levels.{i}.blocks.{j}"
            skip = _widens(config, stage, i, j)
            yield from _edm_block(f"{theirs}_block{j}", block, skip=skip, attention=attends and j == last)
    top = f"{prefix}.{resolution}x{resolution}"
    yield from _weight_and_bias(f"{top}_aux_norm", f"{ours}.norm_out")
    yield from _weight_and_bias(f"{top}_aux_conv", f"{ours}.conv_out")


def _edm_block(theirs: str, ours: str, *, skip: bool = False, attention: bool = False) -> Iterator[tuple[str, Target]]:
    for name in ("norm0", "conv0", "affine", "norm1", "conv1", *(("skip",) if skip else ())):
        yield from _weight_and_bias(f"{theirs}.{name}", f"{ours}.{name}")
    if attention:
        yield from _weight_and_bias(f"{theirs}.norm2", f"{ours}.attention.norm")
        yield f"{theirs}.qkv.weight", Target(f"{ours}.attention.qkv.weight", ones=2, interleaved=True)
        yield f"{theirs}.qkv.bias", Target(f"{ours}.attention.qkv.bias", interleaved=True)
        yield f"{theirs}.proj.weight", Target(f"{ours}.attention.proj.weight", ones=2)
        yield f"{theirs}.proj.bias", Target(f"{ours}.attention.proj.bias")


# --- LDM: `input_blocks.i`, `middle_block.i`, `de_modules.stage.i` (single decoder: `output_blocks.i`); each entry is a
# list of block, attention, resampling.


def ldm_names(config: LDMConfig) -> dict[str, Target]:
    """Return {published name: ours} of an LDM U-Net without class labels."""
    names: dict[str, Target] = {}
    for i in (0, 1):
        names |= dict(_weight_and_bias(f"time_embed.{2 * i}", f"encoders.0.embedding.linear{i}"))
    names |= dict(_ldm_encoder(config))
    for k in range(len(config.decoder_widths)):
        names |= dict(_ldm_decoder(config, k, config.decoder_attends(k)))
    return names


def _ldm_encoder(config: LDMConfig) -> Iterator[tuple[str, Target]]:
    entry, width = 0, 1
    yield from _weight_and_bias("input_blocks.0.0", "encoders.0.conv_in")
    for level, mult in enumerate(config.channel_mult):
        if level:
            entry += 1
            yield from _weight_and_bias(f"input_blocks.{entry}.0.op", f"encoders.0.downs.{level - 1}")
        for i in range(config.blocks_per_level):
            entry += 1
            block = f"encoders.0.levels.{level}.{i}"
            yield from _ldm_block(f"input_blocks.{entry}.0", block, skip=mult != width)
            if 2**level in config.attention_factors:
                yield from _ldm_attention(f"input_blocks.{entry}.1", block)
            width = mult
    yield from _ldm_block("middle_block.0", "encoders.0.middle.block0", skip=False)
    yield from _ldm_attention("middle_block.1", "encoders.0.middle.block0")
    yield from _ldm_block("middle_block.2", "encoders.0.middle.block1", skip=False)


def _ldm_decoder(config: LDMConfig, stage: int, attention: bool) -> Iterator[tuple[str, Target]]:
    ours, entry, levels = f"decoders.{stage}", 0, len(config.channel_mult)
    only = len(config.decoder_widths) == 1
    blocks, out = ("output_blocks", "out") if only else (f"de_modules.{stage}", f"outs.{stage}")
    for i in range(levels):
        attends = attention and 2 ** (levels - 1 - i) in config.attention_factors
        for j in range(config.blocks_per_level + 1):
            theirs, block = f"{blocks}.{entry}", f"{ours}.levels.{i}.{j}"
            yield from _ldm_block(f"{theirs}.0", block, skip=_widens(config, stage, i, j))
            if attends:
                yield from _ldm_attention(f"{theirs}.1", block)
            if j == config.blocks_per_level and i < levels - 1:
                yield from _weight_and_bias(f"{theirs}.{1 + attends}.conv", f"{ours}.ups.{i}.1")
            entry += 1
    yield from _weight_and_bias(f"{out}.0", f"{ours}.norm_out")
    yield from _weight_and_bias(f"{out}.2", f"{ours}.conv_out")


def _ldm_block(theirs: str, ours: str, *, skip: bool) -> Iterator[tuple[str, Target]]:
    pairs = {"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "out_layers.0": "norm1"}
    pairs |= {"out_layers.3": "conv1"} | ({"skip_connection": "skip"} if skip else {})
    for a, b in pairs.items():
        yield from _weight_and_bias(f"{theirs}.{a}", f"{ours}.{b}")


def _ldm_attention(theirs: str, block: str) -> Iterator[tuple[str, Target]]:
    yield from _weight_and_bias(f"{theirs}.norm", f"{block}.attention.norm")
    for a, b in {"qkv": "qkv", "proj_out": "proj"}.items():
        yield f"{theirs}.{a}.weight", Target(f"{block}.attention.{b}.weight", ones=1)
        yield f"{theirs}.{a}.bias", Target(f"{block}.attention.{b}.bias")
