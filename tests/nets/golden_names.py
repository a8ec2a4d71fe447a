"""Published parameter names of every family, as functions of the network's configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from multistage_diffusion.config import NetworkConfig

Layout = Literal["same", "transposed", "pointwise", "interleaved"]


@dataclass(frozen=True)
class Target:
    """Where a published tensor goes.

    Attributes:
        name: our parameter.
        layout: "same"; "transposed" (published (in, out), ours (out, in)); "pointwise" (a published 1x1 convolution,
            ours linear, rows in the same order); "interleaved" (pointwise, or a bias, with rows in order (channel,
            qkv), ours (qkv, channel)).
        third: 0, 1, 2 if the tensor is only the q, k or v rows of ours.
    """

    name: str
    layout: Layout = "same"
    third: int | None = None

    def convert(self, value: Tensor) -> Tensor:
        """Return the published tensor in our layout."""
        if self.layout == "transposed":
            return value.t()
        if self.layout == "interleaved":
            value = value.unflatten(0, (-1, 3)).transpose(0, 1).flatten(0, 1)
        return value.flatten(1) if self.layout != "same" and value.ndim > 2 else value


def convert_published(published: Mapping[str, Tensor], names: Mapping[str, Target]) -> dict[str, Tensor]:
    """Return our state dict; every name of the mapping must be among the published tensors."""
    state: dict[str, Tensor] = {}
    thirds: dict[str, list[Tensor]] = {}
    for theirs, target in names.items():
        value = target.convert(published[theirs])
        if target.third is None:
            state[target.name] = value
        else:
            thirds.setdefault(target.name, [value] * 3)[target.third] = value
    return state | {name: torch.cat(values) for name, values in thirds.items()}


def _weight_and_bias(theirs: str, ours: str) -> Iterator[tuple[str, Target]]:
    for kind in ("weight", "bias"):
        yield f"{theirs}.{kind}", Target(f"{ours}.{kind}")


def _conditioning(config: NetworkConfig, theirs: str, ours: str) -> Iterator[tuple[str, Target]]:
    if config.num_classes:
        yield from _weight_and_bias(f"{theirs}.map_label", f"{ours}.label")
    if config.augment_dim:
        yield f"{theirs}.map_augment.weight", Target(f"{ours}.augment.weight")


# --- NCSN++: `en_modules.i`, `de_modules.stage.i`, numbered in the order of the forward pass.


def ncsnpp_names(config: NetworkConfig) -> dict[str, Target]:
    """Return {published name: ours} of a multi-decoder NCSN++ without class labels."""
    names = dict(_numbered("en_modules", _ncsnpp_encoder_modules(config)))
    for k in range(len(config.decoder_widths)):
        names |= dict(_numbered(f"de_modules.{k}", _ncsnpp_decoder_modules(config, k)))
    return names


Module = tuple[str, Literal["plain", "block", "block+skip", "attention", "pyramid"]]


def _ncsnpp_encoder_modules(config: NetworkConfig) -> Iterator[Module]:
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


def _ncsnpp_decoder_modules(config: NetworkConfig, stage: int) -> Iterator[Module]:
    ours, levels = f"decoders.{stage}", len(config.channel_mult)
    for i in range(levels):
        block = ""
        for j in range(config.blocks_per_level + 1):
            block = f"{ours}.levels.{i}.blocks.{j}"
            yield block, "block+skip"  # its input holds a skip map, so the width always changes
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
        yield f"{theirs}.NIN_{third}.W", Target(f"{ours}.qkv.weight", "transposed", third)
        yield f"{theirs}.NIN_{third}.b", Target(f"{ours}.qkv.bias", third=third)
    yield f"{theirs}.NIN_3.W", Target(f"{ours}.proj.weight", "transposed")
    yield f"{theirs}.NIN_3.b", Target(f"{ours}.proj.bias")


# --- EDM's DDPM++: names carry the resolution.


def edm_names(config: NetworkConfig, resolution: int) -> dict[str, Target]:
    """Return {published name: ours} of a multi-decoder EDM network for square images of this resolution."""
    names = dict(_conditioning(config, "model", "encoders.0.embedding"))
    for i in (0, 1):
        names |= dict(_weight_and_bias(f"model.map_layer{i}", f"encoders.0.embedding.linear{i}"))
    names |= dict(_weight_and_bias(f"model.enc.{resolution}x{resolution}_conv", "encoders.0.conv_in"))
    names |= dict(_edm_encoder_blocks(config, resolution))
    for k in range(len(config.decoder_widths)):
        names |= dict(_edm_decoder(config, k, resolution))
    return names


def _edm_encoder_blocks(config: NetworkConfig, resolution: int) -> Iterator[tuple[str, Target]]:
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


def _edm_decoder(config: NetworkConfig, stage: int, resolution: int) -> Iterator[tuple[str, Target]]:
    ours, levels, last = f"decoders.{stage}", len(config.channel_mult), config.blocks_per_level
    for i in range(levels):
        size = resolution >> (levels - 1 - i)
        theirs = f"model.decs.{stage}.{size}x{size}"
        if i:
            yield from _edm_block(f"{theirs}_up", f"{ours}.ups.{i - 1}", skip=True)
        else:
            yield from _edm_block(f"{theirs}_in0", f"{ours}.bottom.block0", attention=True)
            yield from _edm_block(f"{theirs}_in1", f"{ours}.bottom.block1")
        attends = 2 ** (levels - 1 - i) in config.attention_factors
        for j in range(last + 1):
            block = f"{ours}.levels.{i}.blocks.{j}"
            yield from _edm_block(f"{theirs}_block{j}", block, skip=True, attention=attends and j == last)
    top = f"model.decs.{stage}.{resolution}x{resolution}"
    yield from _weight_and_bias(f"{top}_aux_norm", f"{ours}.norm_out")
    yield from _weight_and_bias(f"{top}_aux_conv", f"{ours}.conv_out")


def _edm_block(theirs: str, ours: str, *, skip: bool = False, attention: bool = False) -> Iterator[tuple[str, Target]]:
    for name in ("norm0", "conv0", "affine", "norm1", "conv1", *(("skip",) if skip else ())):
        yield from _weight_and_bias(f"{theirs}.{name}", f"{ours}.{name}")
    if attention:
        yield from _weight_and_bias(f"{theirs}.norm2", f"{ours}.attention.norm")
        yield f"{theirs}.qkv.weight", Target(f"{ours}.attention.qkv.weight", "interleaved")
        yield f"{theirs}.qkv.bias", Target(f"{ours}.attention.qkv.bias", "interleaved")
        yield f"{theirs}.proj.weight", Target(f"{ours}.attention.proj.weight", "pointwise")
        yield f"{theirs}.proj.bias", Target(f"{ours}.attention.proj.bias")


# --- LDM: `input_blocks.i`, `middle_block.i`, `de_modules.stage.i`, each entry a list: block, attention, resampling.


def ldm_names(config: NetworkConfig) -> dict[str, Target]:
    """Return {published name: ours} of a multi-decoder LDM U-Net without class labels."""
    names: dict[str, Target] = {}
    for i in (0, 1):
        names |= dict(_weight_and_bias(f"time_embed.{2 * i}", f"encoders.0.embedding.linear{i}"))
    names |= dict(_ldm_encoder(config))
    for k, attention in enumerate(config.decoder_attention or [True] * len(config.decoder_widths)):
        names |= dict(_ldm_decoder(config, k, attention))
    return names


def _ldm_encoder(config: NetworkConfig) -> Iterator[tuple[str, Target]]:
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


def _ldm_decoder(config: NetworkConfig, stage: int, attention: bool) -> Iterator[tuple[str, Target]]:
    ours, entry, levels = f"decoders.{stage}", 0, len(config.channel_mult)
    for i in range(levels):
        attends = attention and 2 ** (levels - 1 - i) in config.attention_factors
        for j in range(config.blocks_per_level + 1):
            theirs, block = f"de_modules.{stage}.{entry}", f"{ours}.levels.{i}.{j}"
            # A block keeps its width, and so has no 1x1 skip, only where h and skip together are as wide as the decoder.
            yield from _ldm_block(f"{theirs}.0", block, skip=_ldm_joined(config, stage, i, j))
            if attends:
                yield from _ldm_attention(f"{theirs}.1", block)
            if j == config.blocks_per_level and i < levels - 1:
                yield from _weight_and_bias(f"{theirs}.{1 + attends}.conv", f"{ours}.ups.{i}.1")
            entry += 1
    yield from _weight_and_bias(f"outs.{stage}.0", f"{ours}.norm_out")
    yield from _weight_and_bias(f"outs.{stage}.2", f"{ours}.conv_out")


def _ldm_joined(config: NetworkConfig, stage: int, i: int, j: int) -> bool:
    """Tell whether the input of a decoder's block [h, skip] differs from its output in width."""
    width, encoder = config.decoder_widths[stage], config.encoder_width
    mults = config.channel_mult[::-1]
    above = encoder * mults[0] if i == 0 else width * mults[i - 1]
    skip = encoder * (mults[i] if j < config.blocks_per_level else (*mults, 1)[i + 1])
    return (width * mults[i] if j else above) + skip != width * mults[i]


def _ldm_block(theirs: str, ours: str, *, skip: bool) -> Iterator[tuple[str, Target]]:
    pairs = {"in_layers.0": "norm0", "in_layers.2": "conv0", "emb_layers.1": "affine", "out_layers.0": "norm1"}
    pairs |= {"out_layers.3": "conv1"} | ({"skip_connection": "skip"} if skip else {})
    for a, b in pairs.items():
        yield from _weight_and_bias(f"{theirs}.{a}", f"{ours}.{b}")


def _ldm_attention(theirs: str, block: str) -> Iterator[tuple[str, Target]]:
    yield from _weight_and_bias(f"{theirs}.norm", f"{block}.attention.norm")
    for a, b in {"qkv": "qkv", "proj_out": "proj"}.items():
        yield f"{theirs}.{a}.weight", Target(f"{block}.attention.{b}.weight", "pointwise")
        yield f"{theirs}.{a}.bias", Target(f"{block}.attention.{b}.bias")
