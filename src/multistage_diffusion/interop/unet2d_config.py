"""Settings of diffusers' UNet2DModel: its config.json, to and from those of the LDM U-Net.

No code of diffusers runs. A setting that no network here has is refused by its own name and value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

from ..config import NetworkConfig
from ..errors import UserError
from ..nets.ldm import LDMConfig
from ..reading import brief
from .file_terms import file_terms

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
_LARGEST = 100_000  # side of an input
# What diffusers' EMAModel adds to the configuration of an averaged network.
_AVERAGING = {"decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup"}
# Which of them give settings of ours, for messages; all that are not named here concern the widths.
_SOURCES = {
    "network.channels": "in_channels",
    "network.num_classes": "num_class_embeds",
    "network.blocks_per_level": "layers_per_block",
    "network": "block_out_channels",
}
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
        raise UserError(f"block_out_channels={brief(widths)}: only multiples of the first are read")
    down, up = _attends(s, "down", len(widths)), _attends(s, "up", len(widths))[::-1]
    if up not in (down, [False] * len(widths)):
        raise UserError(
            f"up_block_types={brief(s['up_block_types'])}: their attention is at other levels than that of "
            f"down_block_types={brief(s['down_block_types'])}; only equal levels are read, or none in the up blocks"
        )
    attended = [width for width, attends in zip(widths, down, strict=True) if attends]
    _check_groups(s, attended + ([widths[-1]] if s["add_attention"] else []))
    with file_terms({ours: f"{name}={brief(s[name])}" for ours, name in _SOURCES.items()}):
        return _network(s, mults, down, up)


def _network(s: Mapping[str, Any], mults: Sequence[int], down: Sequence[bool], up: Sequence[bool]) -> LDMConfig:
    """Return the settings of our network.

    Args:
        s: the checked settings of a UNet2DModel.
        mults: width of each level, as a multiple of the first.
        down, up: which levels have attention on each side, finest first.
    """
    width = s["block_out_channels"][0]
    return cast(
        LDMConfig,
        NetworkConfig.of(
            "ldm",
            channels=s["in_channels"],
            encoder_width=width,
            decoder_widths=(width,),
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


def _check_groups(s: Mapping[str, Any], attended: Sequence[int]) -> None:
    """Check that groups divide every width, and channels of a head every width that attends."""
    groups, head, widths = s["norm_num_groups"], s["attention_head_dim"], s["block_out_channels"]
    uneven = [width for width in widths if width % groups]
    if uneven:
        raise UserError(f"norm_num_groups={groups} does not divide {uneven[0]} of block_out_channels={brief(widths)}")
    uneven = [width for width in attended if head is not None and width % head]
    if uneven:
        raise UserError(
            f"attention_head_dim={head} does not divide {uneven[0]} channels that attend (block_out_channels={brief(widths)}); "
            "only heads that divide them are read"
        )


def size_of_unet2d(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return (height, width) of a UNet2DModel's input; None if its config.json does not hold it."""
    size = config.get("sample_size")
    if size is None:
        return None
    pair = [size, size] if isinstance(size, int) else size
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(v) is int and v > 0 for v in pair):
        raise UserError(f"sample_size={brief(size)} must be a positive number or two")
    if max(pair) > _LARGEST:
        raise UserError(f"sample_size={brief(size)} is more than {_LARGEST}, the largest side that is read")
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
    _check_ranges(s)
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


def _check_ranges(s: Mapping[str, Any]) -> None:
    for name in ("in_channels", "layers_per_block", "norm_num_groups", "attention_head_dim", "num_class_embeds"):
        if s[name] is not None and s[name] < 1:
            raise UserError(f"{name}={brief(s[name])} must be positive")
    if not 0 <= s["dropout"] < 1:
        raise UserError(f"dropout={s['dropout']} must be in [0, 1)")
    if not 0 < s["norm_eps"] < 1:
        raise UserError(f"norm_eps={s['norm_eps']} must be in (0, 1)")


def _attends(s: Mapping[str, Any], side: Literal["down", "up"], levels: int) -> list[bool]:
    """Return which blocks of one side have attention."""
    name, known = f"{side}_block_types", {f"{kind}{side.title()}Block2D": bool(kind) for kind in ("", "Attn")}
    types = s[name]
    if not isinstance(types, list) or len(types) != levels:
        raise UserError(f"{name}={brief(types)} must name a block for each of the {levels} block_out_channels")
    unknown = [kind for kind in types if not isinstance(kind, str) or kind not in known]
    if unknown:
        raise UserError(f"{name}={brief(types)}: {brief(unknown[0])} is not read, only {' and '.join(known)}")
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
