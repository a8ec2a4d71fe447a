"""Published parameter names of both families, as functions of the network's configuration."""

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
            ours linear); "interleaved" (pointwise, or a bias, with rows in order (channel, qkv), ours (qkv, channel)).
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
        return value.flatten(1) if self.layout != "same" and value.ndim == 4 else value


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
