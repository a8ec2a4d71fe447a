"""Conversion of the autoencoder in a latent diffusion checkpoint (`first_stage_model.*`) to a diffusers model: VQ or KL."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError
from ..latent.codecs import import_diffusers

_GROUPS = 32  # groups of every GroupNorm in CompVis' autoencoders
_CODEBOOK = "quantize.embedding.weight"
_ARTICLE = {"VQModel": "a", "AutoencoderKL": "an"}
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_RENAMED = (
    (r"\.mid\.block_([12])\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}."),
    (r"\.mid\.attn_1\.", lambda m: ".mid_block.attentions.0."),
    (r"\.block\.(\d+)\.", lambda m: f".resnets.{m[1]}."),
    (r"\.attn\.(\d+)\.", lambda m: f".attentions.{m[1]}."),
    (r"\.nin_shortcut\.", lambda m: ".conv_shortcut."),
    (r"\.(down|up)sample\.", lambda m: f".{m[1]}samplers.0."),
    (r"^(encoder|decoder)\.norm_out\.", lambda m: f"{m[1]}.conv_norm_out."),
    (r"(\.attentions\.\d+)\.(norm|q|k|v|proj_out)\.", lambda m: f"{m[1]}.{_ATTENTION[m[2]]}."),
)


def first_stage(tensors: Mapping[str, Tensor], scale: float = 1.0) -> Any:
    """Return a first stage as a diffusers VQModel or AutoencoderKL.

    Args:
        tensors: by CompVis' names, without `first_stage_model.`; those of its training loss are ignored.
        scale: factor of the latents, written to the codec's configuration as scaling_factor.

    Raises:
        UserError: if it is neither, a tensor does not fit, or diffusers is not installed.
    """
    diffusers = import_diffusers()
    tensors = {name: value for name, value in tensors.items() if not name.startswith("loss.")}
    try:
        kind, settings = _settings(tensors)
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"first_stage_model is no whole VQ or KL autoencoder ({error})") from None
    model = getattr(diffusers, kind)(**settings, scaling_factor=scale)
    levels = len(settings["block_out_channels"])
    state = {diffusers_name(name, levels): value for name, value in tensors.items()}
    needed = dict(model.state_dict())
    # attention projections are 1x1 convolutions in CompVis' code and linear layers in diffusers
    fitted = {
        name: value.reshape(needed[name].shape).float()
        for name, value in state.items()
        if name in needed and value.shape in (needed[name].shape, (*needed[name].shape, 1, 1))
    }
    unfit = [name for name in needed | state if name not in fitted]
    if unfit:
        raise UserError(
            f"first_stage_model: {unfit[0]} does not fit {_ARTICLE[kind]} {kind}, one of {len(unfit)} tensors"
        )
    model.load_state_dict(fitted)
    return model.eval()


def downsampling(tensors: Mapping[str, Tensor]) -> int | None:
    """Return the side of an image over that of its latent; None if the tensors are of no autoencoder."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    return int(2 ** (levels - 1)) if levels else None


def diffusers_name(name: str, levels: int) -> str:
    """Return diffusers' name of a tensor of CompVis' autoencoder; diffusers numbers `up` levels in reverse order."""
    name = re.sub(r"^encoder\.down\.(\d+)", r"encoder.down_blocks.\1", name)
    name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}", name)
    for pattern, new in _RENAMED:
        name = re.sub(pattern, new, name)
    return name


def _settings(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Any]]:
    """Derive the class, VQModel or AutoencoderKL, and its arguments from the tensors' names and shapes."""
    levels = _count(tensors, r"encoder\.down\.(\d+)\.")
    down, up = (
        [any(name.startswith(f"{half}.{i}.attn.") for name in tensors) for i in range(levels)]
        for half in ("encoder.down", "decoder.up")
    )
    settings = {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "block_out_channels": tuple(tensors[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] for i in range(levels)),
        "layers_per_block": _count(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        "down_block_types": tuple("AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in down),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in up[::-1]),
        "norm_num_groups": _GROUPS,
    }
    encoded = tensors["encoder.conv_out.weight"].shape[0]
    if _CODEBOOK in tensors:
        codes, code_width = tensors[_CODEBOOK].shape
        sizes = {"latent_channels": encoded, "num_vq_embeddings": codes, "vq_embed_dim": code_width}
        return "VQModel", {**settings, **sizes}
    embedded = tensors["post_quant_conv.weight"].shape[1]
    if encoded != 2 * embedded:
        raise ValueError(f"its encoder makes {encoded} channels, not mean and variance of {embedded}")
    return "AutoencoderKL", {**settings, "latent_channels": embedded}


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return len({m[1] for name in tensors if (m := re.match(pattern, name))})
