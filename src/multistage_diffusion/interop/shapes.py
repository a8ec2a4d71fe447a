"""Conversion of published networks: the configuration from tensor names and shapes, the weights in our layout."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from ..config import NetworkConfig
from ..errors import UserError
from ..nets.blocks import GROUPS
from ..nets.network import meta_network
from .names import convert_published, published_names, restore_published
from .parts import Family, Tensors, weight


def network_of(
    family: Family, tensors: Mapping[str, Tensor], *, norm_groups: int = GROUPS, head_channels: int = 32
) -> NetworkConfig:
    """Return the configuration of a published network, without dropout, which is a training setting.

    norm_groups and head_channels cannot be derived from shapes.

    Args:
        family: family of the network and its names.
        tensors: the network's weights by published name.
        norm_groups: largest number of GroupNorm groups of NCSN++ or DDPM++.
        head_channels: channels per attention head of an LDM U-Net.

    Raises:
        UserError: naming the first tensor that is missing or has an impossible shape.
    """
    read = {"ncsnpp": _ncsnpp, "ddpmpp": _ddpmpp, "ldm": _ldm}[family]
    settings = read(_Shapes(tensors))
    if family == "ldm":
        settings["head_channels"] = head_channels
    else:
        settings["norm_groups"] = norm_groups
    return NetworkConfig.of(family, **settings)


def resolution_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the image resolution of an EDM network, from its tensor names."""
    return max(_edm_resolutions(_Shapes(tensors)))


def our_state(tensors: Mapping[str, Tensor], config: NetworkConfig, size: tuple[int, int]) -> Tensors:
    """Return a published network's weights as a state dict of our network, fp32.

    Args:
        tensors: weights by published name.
        config: configuration of the network.
        size: (height, width) of its images.

    Raises:
        UserError: with the first missing, unexpected and wrongly shaped tensors and their counts.
    """
    names = published_names(config, size)
    require_tensors(tensors, _needed(config, size), config)
    converted = convert_published({name: weight(name, value) for name, value in tensors.items()}, names)
    return {name: value.contiguous() for name, value in converted.items()}


def require_tensors(tensors: Mapping[str, Tensor], needed: Mapping[str, Tensor], config: NetworkConfig) -> None:
    """Raise UserError unless tensors have the names and shapes of those that a network needs.

    Raises:
        UserError: with the first missing, unexpected and wrongly shaped tensors and their counts.
    """
    missing = [name for name in needed if name not in tensors]
    extra = [name for name in tensors if name not in needed]
    wrong = [name for name in needed if name in tensors and tensors[name].shape != needed[name].shape]
    faults = [
        f"{len(found)} {what} ({found[0]})" for found, what in ((missing, "missing"), (extra, "unexpected")) if found
    ]
    if wrong:
        shapes = f"{list(tensors[wrong[0]].shape)}, not {list(needed[wrong[0]].shape)}"
        faults.append(f"{len(wrong)} of another shape ({wrong[0]}: {shapes})")
    if faults:
        raise UserError(
            f"does not fit a {config.family} network of encoder width {config.encoder_width} and decoder widths "
            f"{list(config.decoder_widths)}; of its tensors, {', '.join(faults)}"
        )


def published_state(state: Mapping[str, Tensor], config: NetworkConfig, size: tuple[int, int]) -> Tensors:
    """Return the published tensors of our network's state dict: the inverse of `our_state`.

    Raises:
        UserError: if no published layout can represent the network.
    """
    return restore_published(state, published_names(config, size))


@lru_cache(maxsize=1)  # called for the model and for its EMA
def _needed(config: NetworkConfig, size: tuple[int, int]) -> Tensors:
    return published_state(meta_network(config).state_dict(), config, size)


class _Shapes:
    """Shapes by name; a call raises UserError for a missing tensor or another number of dimensions."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __call__(self, name: str, dims: int) -> tuple[int, ...]:
        if name not in self.tensors:
            raise UserError(f"has no {name}")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != dims or 0 in shape:
            raise UserError(f"{name} has shape {list(shape)}, not {dims} dimensions")
        return shape

    def any(self, pattern: str) -> bool:
        """Return whether the beginning of any name matches a pattern."""
        return any(re.match(pattern, name) for name in self.tensors)

    def numbers(self, pattern: str) -> list[int]:
        """Return the distinct numbers in the first group of a pattern matched at the beginning of names, ascending."""
        return sorted({int(m[1]) for name in self.tensors if (m := re.match(pattern, name))})


def _times(channels: int, width: int, name: str) -> int:
    if channels % width:
        raise UserError(f"{name} has {channels} channels, not a multiple of {width}")
    return channels // width


def _blocks(count: int, levels: int, what: str) -> int:
    if count < levels or count % levels:
        raise UserError(f"has {count} {what} for {levels} levels; every level must have as many")
    return count // levels


def _ncsnpp(shape: _Shapes) -> dict[str, Any]:
    """Read `en_modules.i` and `de_modules.stage.i`, or `all_modules.i`: Linear, Linear, conv, blocks, ..."""
    stages = shape.numbers(r"de_modules\.(\d+)\.")
    encoder = "en_modules" if stages else "all_modules"
    _require_plain_ncsnpp(shape, encoder)
    width = shape(f"{encoder}.0.weight", 2)[1]
    levels = len(shape.numbers(rf"{encoder}\.(\d+)\.Conv2d_0\.weight")) + 1  # each but the last ends in a pyramid step
    blocks = shape.numbers(rf"{encoder}\.(\d+)\.Conv_0\.weight")
    projections = [f"{encoder}.{i}.Conv_2.weight" for i in blocks]
    # only resampling blocks have a 1x1 skip between equal widths
    if levels == 1 and any(len({*shape(n, 4)[:2]}) == 1 for n in projections if n in shape.tensors):
        raise UserError(
            f"resamples without an input pyramid ({encoder}.I.Conv2d_0), as score_sde's DDPM++ does; only its NCSN++ is read"
        )
    # encoder: each level's blocks, a down block except at the last level, and two bottom blocks; decoder: one more
    # block per level than the encoder, and an up block except at the last level
    if stages:
        per_level = _blocks(len(blocks) - levels - 1, levels, "encoder blocks")
    else:
        per_level = _blocks(len(blocks) - 3 * levels, 2 * levels, "blocks")
    first = [blocks[i * (per_level + 1)] for i in range(levels)]
    mults = [_times(shape(n := f"{encoder}.{i}.Conv_0.weight", 4)[0], width, n) for i in first]
    outs = [_last_conv(shape, f"de_modules.{k}" if stages else encoder) for k in stages or [0]]
    return {
        "channels": shape(f"{encoder}.2.weight", 4)[1],
        "encoder_width": width,
        "decoder_widths": tuple(_times(shape(out, 4)[1], mults[0], out) for out in outs),
        "channel_mult": tuple(mults),
        "blocks_per_level": per_level,
        "attention_factors": tuple(
            2**level for level, i in enumerate(first) if shape.any(rf"{encoder}\.{i + 1}\.NIN_0\.")
        ),
    }


def _last_conv(shape: _Shapes, modules: str) -> str:
    last = max(shape.numbers(re.escape(modules) + r"\.(\d+)\."))
    return f"{modules}.{last}.weight"


def _edm_resolutions(shape: _Shapes) -> list[int]:
    found = shape.numbers(r"model\.enc\.(\d+)x\d+_block0\.")[::-1]
    if not found:
        raise UserError("has no model.enc.RESxRES_block0")
    return found


def _ddpmpp(shape: _Shapes) -> dict[str, Any]:
    """Read `model.enc.RESxRES_*` and `model.decs.stage.RESxRES_*`, or `model.dec.RESxRES_*`."""
    sizes = [f"{r}x{r}" for r in _edm_resolutions(shape)]
    width = shape("model.map_layer0.weight", 2)[1]
    firsts = [f"model.enc.{size}_block0" for size in sizes]
    mults = [_times(shape(n := f"{first}.conv0.weight", 4)[0], width, n) for first in firsts]
    stages = shape.numbers(r"model\.decs\.(\d+)\.")
    outs = [f"model.{f'decs.{k}' if stages else 'dec'}.{sizes[0]}_aux_conv.weight" for k in stages or [0]]
    labels = {"num_classes": "model.map_label.weight", "augment_dim": "model.map_augment.weight"}
    return {
        "channels": shape(f"model.enc.{sizes[0]}_conv.weight", 4)[1],
        "encoder_width": width,
        "decoder_widths": tuple(_times(shape(out, 4)[1], mults[0], out) for out in outs),
        "channel_mult": tuple(mults),
        "blocks_per_level": len(shape.numbers(rf"model\.enc\.{sizes[0]}_block(\d+)\.")),
        "attention_factors": tuple(
            2**level for level, first in enumerate(firsts) if shape.any(rf"{re.escape(first)}\.qkv\.")
        ),
        **{name: shape(key, 2)[1] for name, key in labels.items() if key in shape.tensors},
    }


def _require_plain_ldm(shape: _Shapes) -> None:
    """Raise UserError, naming the difference, for latent diffusion's networks that are built of other parts."""
    names = shape.tensors
    blocks = [name.removesuffix(".emb_layers.1.weight") for name in names if name.endswith(".emb_layers.1.weight")]
    scaled = [
        block
        for block in blocks
        if shape(f"{block}.emb_layers.1.weight", 2)[0] == 2 * shape(f"{block}.in_layers.2.weight", 4)[0]
    ]
    updown = [name for name in names if re.match(r"(output_blocks|de_modules\.\d+)\.\d+\.[12]\.in_layers\.", name)]
    crossing = [name for name in names if ".transformer_blocks." in name]
    for found, what in (
        (crossing, "attends to a condition, such as text or a class (use_spatial_transformer)"),
        ([name for name in names if name.startswith("label_emb.")], "is class-conditional (num_classes)"),
        ([f"{block}.emb_layers.1.weight" for block in scaled], "scales and shifts by the noise (use_scale_shift_norm)"),
        (updown, "resamples in residual blocks (resblock_updown)"),
        ([name for name in names if name.startswith("id_predictor")], "predicts codebook entries (n_embed)"),
    ):
        if found:
            raise UserError(
                f"{what}, see {found[0]}; of latent diffusion's networks only unconditional ones of plain blocks are read, as "
                "those of CelebA-HQ, FFHQ and LSUN bedrooms"
            )


def _require_plain_ncsnpp(shape: _Shapes, modules: str) -> None:
    """Raise UserError for score_sde's networks with convolutions outside their blocks: DDPM, and pyramids of images."""
    convolved = shape.numbers(rf"{modules}\.(\d+)\.Conv_0\.weight")
    bare = [i for i in convolved if f"{modules}.{i}.GroupNorm_0.weight" not in shape.tensors]
    mixed = [i for i in convolved if f"{modules}.{i}.NIN_0.W" in shape.tensors]
    if bare or mixed:
        where = f"{modules}.{(bare or mixed)[0]}"
        raise UserError(
            f"has blocks of score_sde's DDPM, or a pyramid that adds images (input_skip), at {where}; only NCSN++ with "
            "the residual input pyramid is read"
        )


def _ldm(shape: _Shapes) -> dict[str, Any]:
    """Read `input_blocks.i.j` and `de_modules.stage.i.j` with `outs.stage`, or `output_blocks.i.j` with `out`."""
    _require_plain_ldm(shape)
    width, channels, *_ = shape("input_blocks.0.0.weight", 4)
    downs = shape.numbers(r"input_blocks\.(\d+)\.0\.op\.")
    entries = [i for i in shape.numbers(r"input_blocks\.(\d+)\.") if i and i not in downs]
    levels = len(downs) + 1
    per_level = _blocks(len(entries), levels, "input blocks")
    first = entries[::per_level]
    mults = [_times(shape(n := f"input_blocks.{i}.0.in_layers.2.weight", 4)[0], width, n) for i in first]
    stages = shape.numbers(r"de_modules\.(\d+)\.")
    outs = [f"outs.{k}.2.weight" if stages else "out.2.weight" for k in stages or [0]]
    made = shape(outs[0], 4)[0]
    if made != channels:
        raise UserError(
            f"takes {channels} channels and makes {made}: it is told of other images, as networks of inpainting and "
            "super-resolution are; only unconditional ones are read"
        )
    factors = tuple(2**level for level, i in enumerate(first) if shape.any(rf"input_blocks\.{i}\.1\.qkv\."))
    decoders = [rf"de_modules\.{k}" if stages else "output_blocks" for k in stages or [0]]
    attends = tuple(shape.any(rf"{decoder}\.\d+\.1\.qkv\.") for decoder in decoders)
    return {
        "channels": channels,
        "encoder_width": width,
        "decoder_widths": tuple(_times(shape(out, 4)[1], mults[0], out) for out in outs),
        "channel_mult": tuple(mults),
        "blocks_per_level": per_level,
        "attention_factors": factors,
        "decoder_attention": None if not factors or all(attends) else attends,
    }
