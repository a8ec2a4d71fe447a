"""Networks of diffusers' UNet2DModel: the settings of its config.json and its weights, to and from the LDM U-Net.

No code of diffusers runs. A setting that no network here has is refused by its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..config import NetworkConfig
from ..errors import UserError
from ..nets.ldm import LDMConfig
from ..nets.network import meta_network
from ..reading import brief

CLASS = "UNet2DModel"
# Settings with their defaults in diffusers (older files leave out newer ones), and the values that networks here have.
_FIXED: dict[str, tuple[Any, ...]] = {
    "center_input_sample": (False,),
    "time_embedding_type": ("positional",),
    "mid_block_type": ("UNetMidBlock2D",),
    "mid_block_scale_factor": (1,),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "act_fn": ("silu", "swish"),
    "class_embed_type": (None,),
}
_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [224, 448, 672, 896],
    "layers_per_block": 2,
    "downsample_padding": 1,
    "dropout": 0.0,
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "num_class_embeds": None,
    "num_train_timesteps": None,
}
# What diffusers' EMAModel adds to the configuration of an averaged network.
_AVERAGING = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # names before diffusers 0.18
_LABELS = "encoders.0.embedding.label.weight"  # (4 width, classes); an nn.Embedding (classes, 4 width) in UNet2DModel
_SCALE_SHIFT = {"default": False, "scale_shift": True}


def network_of_unet2d(config: Mapping[str, Any]) -> LDMConfig:
    """Return the settings of the network that a UNet2DModel's config.json describes.

    Raises:
        UserError: naming the first setting that no network here has.
    """
    s = _settings(config)
    widths = s["block_out_channels"]
    mults = [width // widths[0] for width in widths]
    if [mult * widths[0] for mult in mults] != widths:
        raise UserError(f"block_out_channels={widths}: only multiples of the first are read")
    down, up = _attends(s, "down", len(widths)), _attends(s, "up", len(widths))[::-1]
    if up not in (down, [False] * len(widths)):
        raise UserError(
            f"up_block_types={s['up_block_types']}: their attention is at other levels than that of "
            f"down_block_types={s['down_block_types']}; only equal levels are read, or none in the up blocks"
        )
    return cast(
        LDMConfig,
        NetworkConfig.of(
            "ldm",
            channels=s["in_channels"],
            encoder_width=widths[0],
            decoder_widths=(widths[0],),
            dropout=float(s["dropout"]),
            num_classes=s["num_class_embeds"] or 0,
            channel_mult=tuple(mults),
            blocks_per_level=s["layers_per_block"],
            attention_factors=tuple(2**level for level, attends in enumerate(down) if attends),
            head_channels=s["attention_head_dim"],
            decoder_attention=(False,) if any(down) and not any(up) else None,
            middle_attention=_middle(s),
            group_count=s["norm_num_groups"],
            norm_eps=float(s["norm_eps"]),
            down_padding="symmetric" if s["downsample_padding"] else "asymmetric",
            embedding_order="cos-sin" if s["flip_sin_to_cos"] else "sin-cos",
            embedding_shift=s["freq_shift"],
            scale_shift=_SCALE_SHIFT[s["resnet_time_scale_shift"]],
            label_embedding="output",
        ),
    )


def size_of_unet2d(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of a UNet2DModel's input; None if its config.json does not hold it."""
    size = config.get("sample_size")
    if size is None:
        return None
    pair = [size, size] if isinstance(size, int) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(v) is int and v > 0 for v in pair):
        raise UserError(f"sample_size={brief(size)} must be a positive number or two")
    return pair[0], pair[1]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return all settings, checked, with the defaults of those that are missing."""
    if config.get("_class_name") != CLASS:
        raise UserError(f"_class_name={brief(config.get('_class_name'))}: only {CLASS} is read")
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    unknown = [key for key in given if key not in _DEFAULTS and key not in _FIXED and key not in _AVERAGING]
    if unknown:
        raise UserError(f"{unknown[0]}={brief(given[unknown[0]])}: this setting of {CLASS} is unknown here")
    for name, allowed in _FIXED.items():
        if given.get(name, allowed[0]) not in allowed:
            raise UserError(
                f"{name}={brief(given[name])}: only {' or '.join(repr(value) for value in allowed)} is read"
            )
    s = {**_DEFAULTS, **given}
    _check_types(s)
    if s["in_channels"] != s["out_channels"]:
        raise UserError(
            f"out_channels={s['out_channels']} for in_channels={s['in_channels']}: only equal numbers are read (a learnt "
            "variance is not)"
        )
    choices = {
        "time_embedding_dim": (None, 4 * s["block_out_channels"][0]),
        "attn_norm_num_groups": (None, s["norm_num_groups"]),
        "downsample_padding": (0, 1),
        "resnet_time_scale_shift": tuple(_SCALE_SHIFT),
        "freq_shift": (0, 1),
    }
    for name, values in choices.items():
        if s[name] not in values:
            raise UserError(f"{name}={brief(s[name])}: only {' or '.join(repr(value) for value in values)} is read")
    return s


def _check_types(s: Mapping[str, Any]) -> None:
    whole = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "freq_shift", "downsample_padding")
    for name in (*whole, "attention_head_dim", "num_class_embeds", "time_embedding_dim", "attn_norm_num_groups"):
        if type(s[name]) is not int and not (s[name] is None and name not in whole):
            raise UserError(f"{name}={brief(s[name])} must be a whole number")
    for name in ("dropout", "norm_eps"):
        if type(s[name]) not in (int, float):
            raise UserError(f"{name}={brief(s[name])} must be a number")
    for name in ("flip_sin_to_cos", "add_attention"):
        if type(s[name]) is not bool:
            raise UserError(f"{name}={brief(s[name])} must be true or false")
    widths = s["block_out_channels"]
    if not isinstance(widths, list) or not widths or not all(type(width) is int and width > 0 for width in widths):
        raise UserError(f"block_out_channels={brief(widths)} must be a list of positive numbers")


def _attends(s: Mapping[str, Any], side: Literal["down", "up"], levels: int) -> list[bool]:
    """Return which blocks of one side have attention."""
    name, known = f"{side}_block_types", {f"{kind}{side.title()}Block2D": bool(kind) for kind in ("", "Attn")}
    types = s[name]
    if not isinstance(types, list) or len(types) != levels:
        raise UserError(f"{name}={brief(types)} must name a block for each of {levels} levels")
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in known]
    if unknown:
        raise UserError(f"{name}: {brief(unknown[0])} is not read, only {' and '.join(known)}")
    return [known[kind] for kind in types]


def _middle(s: Mapping[str, Any]) -> str:
    """Return the attention of the middle; with scale and shift, it has a GroupNorm only if its groups are given."""
    if not s["add_attention"]:
        return "none"
    bare = s["resnet_time_scale_shift"] == "scale_shift" and s["attn_norm_num_groups"] is None
    return "plain" if bare else "normalised"


def unet2d_settings(config: NetworkConfig, size: Sequence[int]) -> dict[str, Any]:
    """Return the config.json of the UNet2DModel that a one-stage network is: the inverse of `network_of_unet2d`.

    Args:
        config: settings of the network.
        size: (height, width) of its input.

    Raises:
        UserError: naming the setting that no UNet2DModel has.
    """
    if not isinstance(config, LDMConfig):
        raise UserError(f"network.family={config.family!r}: only 'ldm' networks can be a {CLASS}")
    for name, found, needed in (
        ("decoders", len(config.decoder_widths), 1),
        ("network.decoder_widths", config.decoder_widths[0], config.encoder_width),
        ("network.augment_dim", config.augment_dim, 0),
        ("network.label_embedding", config.label_embedding if config.num_classes else "output", "output"),
    ):
        if found != needed:
            raise UserError(f"{name}={found!r}: a {CLASS} has {needed!r}")
    attends = [config.attends(level) for level in range(len(config.channel_mult))]
    up = [a and config.decoder_attends(0) for a in attends[::-1]]
    plain = config.scale_shift and config.middle_attention == "plain"
    if config.middle_attention == "plain" and not plain:
        raise UserError("network.middle_attention='plain': a UNet2DModel has it with network.scale_shift only")
    height, width = size
    return {
        "_class_name": CLASS,
        **{name: allowed[0] for name, allowed in _FIXED.items()},
        **_DEFAULTS,
        "sample_size": height if height == width else [height, width],
        "in_channels": config.channels,
        "out_channels": config.channels,
        "freq_shift": config.embedding_shift,
        "flip_sin_to_cos": config.embedding_order == "cos-sin",
        "down_block_types": ["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "up_block_types": ["AttnUpBlock2D" if a else "UpBlock2D" for a in up],
        "block_out_channels": [config.encoder_width * mult for mult in config.channel_mult],
        "layers_per_block": config.blocks_per_level,
        "downsample_padding": int(config.down_padding == "symmetric"),
        "dropout": config.dropout,
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.group_count,
        "attn_norm_num_groups": config.group_count if config.scale_shift and not plain else None,
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.scale_shift else "default",
        "add_attention": config.middle_attention != "none",
        "num_class_embeds": config.num_classes or None,
    }


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
    needed = meta_network(config).state_dict()
    names, attentions = _names(config), _attentions(config)
    state = {ours: tensors.pop(theirs, None) for theirs, ours in names.items() if ours in needed}
    if (labels := state.get(_LABELS)) is not None and labels.ndim == 2:
        state[_LABELS] = labels.t()
    for a in attentions:
        for kind in ("weight", "bias"):
            thirds = [tensors.pop(f"{a.theirs}.to_{letter}.{kind}", None) for letter in "qkv"]
            whole = all(third is not None and third.shape == thirds[0].shape for third in thirds)  # type: ignore[union-attr]
            state[f"{a.ours}.qkv.{kind}"] = _by_head(thirds, a.head_channels) if whole else None  # type: ignore[arg-type]
    theirs_of = {ours: theirs for theirs, ours in names.items()}
    for ours, value in needed.items():
        found = state.get(ours)
        theirs = theirs_of.get(ours, ours)
        if found is None:
            raise UserError(f"has no {theirs}")
        if _is_projection(theirs) and found.ndim == 4:  # 1x1 convolutions in older files
            state[ours] = found = found.flatten(1)
        if found.shape != value.shape:
            raise UserError(f"{theirs} has shape {list(found.shape)}, not {list(value.shape)}")
        if not found.is_floating_point():
            raise UserError(f"{theirs} is of {found.dtype}: quantised weights are not read")
    if tensors:
        raise UserError(f"{next(iter(tensors))}: no weight of this network ({len(tensors)} unexpected)")
    return {name: state[name].to(torch.float32, copy=True).contiguous() for name in needed}  # type: ignore[union-attr]


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
    flat = [third.flatten(1) if third.ndim == 4 else third for third in thirds]
    heads = [third.reshape(-1, head_channels or len(third), *third.shape[1:]) for third in flat]
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
