"""A published checkpoint as plain values (`Published`), and what the readers of its layouts share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..nets.blocks import GROUPS
from .names import is_buffer

ORIGINAL = 32  # largest number of GroupNorm groups in score_sde's and EDM's own code; GROUPS in the multi-stage code
# settings that exports add to those of the layout
EDGES, HEADS, SAMPLING, NORM_GROUPS = "sigma_edges", "num_head_channels", "sampling", "norm_groups"

Family = Literal["ncsnpp", "ddpmpp", "ldm"]
Tensors = dict[str, Tensor]

_CODE = {
    "ncsnpp": "score_sde's NCSN++ (.pth)",
    "ddpmpp": "EDM's DDPM++ (.pkl)",
    "ldm": "latent diffusion's U-Net (.ckpt)",
}
_WEIGHTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FIRST = {
    "ncsnpp": ("en_modules.", "all_modules."),
    "ddpmpp": ("model.map_layer", "model.enc."),
    "ldm": ("time_embed.", "input_blocks."),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint as plain values.

    Attributes:
        family: family of the network.
        model: {published name: weight}, without a wrapper's prefix; None if the file holds only the EMA.
        ema: the EMA weights by the same names; None if there are none.
        codec: first stage of a latent diffusion file, by CompVis' names.
        buffers: other tensors of a latent diffusion file: betas, scale_factor, ...
        arguments: the original code's settings of the network; a file that was read has `settings` among them.
        settings: what exports add, because neither shapes nor the original code's settings tell it: EDGES, HEADS, SAMPLING.
        norm_groups: a GroupNorm has min(channels // 4, norm_groups) groups; in LDM always 32.
        norm_groups_known: whether the file, or the only code that writes such files, determines norm_groups.
        step: training steps done; written, not read.
    """

    family: Family
    model: Tensors | None
    ema: Tensors | None
    codec: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    norm_groups: int = GROUPS
    norm_groups_known: bool = True
    step: int = 0

    def written_settings(self) -> dict[str, Any]:
        """Return the settings that are written beside the original code's own."""
        return {**self.settings, NORM_GROUPS: self.norm_groups}


def mapping(value: Any, what: str) -> Mapping[Any, Any]:
    """Return a dictionary; raise UserError for any other value."""
    if not isinstance(value, dict):
        raise UserError(f"{what}: is a {type(value).__name__}, not a dictionary")
    return value


def tensors(value: Any, what: str, prefix: str = "") -> Tensors:
    """Check and return a dictionary of tensors, with a prefix added to each name."""
    found = mapping(value, what)
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{what}: {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{what}: {name!r} does not hold all of its {tensor.numel()} numbers")
    return {f"{prefix}{name}": tensor.detach() for name, tensor in found.items()}


def said_groups(arguments: dict[str, Any]) -> int | None:
    """Remove the largest number of GroupNorm groups from a file's arguments and return it; None if it is not there."""
    said = arguments.pop(NORM_GROUPS, None)
    return said if type(said) is int and said > 0 else None


def weight(name: str, value: Tensor) -> Tensor:
    """Return a copy of a weight in float32.

    Raises:
        UserError: naming it, if it is quantised or no real number, or not finite in float32.
    """
    if value.dtype not in _WEIGHTS:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _WEIGHTS)
        raise UserError(f"{name} is of {value.dtype}: only weights of {kinds} are read, none that are quantised")
    found = value.to(torch.float32, copy=True).contiguous()
    if not found.isfinite().all():
        raise UserError(
            f"weights of {name} are not finite: the file is that of a training that diverged, or of numbers too large for its "
            "precision"
        )
    return found


def learnt(values: Tensors) -> Tensors:
    """Return the tensors that are learnt, without constant buffers."""
    return {name: value for name, value in values.items() if not is_buffer(name)}


def require_family(family: Family, names: Mapping[str, Tensor]) -> None:
    """Raise UserError unless there are tensors of the family; the message names the family found."""
    found = [f for f, first in _FIRST.items() if any(name.startswith(first) for name in names)]
    if family not in found:
        first = next(iter(names), "nothing")
        whose = f"that of {_CODE[found[0]]}" if found else "of unknown code"
        raise UserError(f"this layout is that of {_CODE[family]}, but its first tensor, {first}, is {whose}")


def plain(value: Any) -> dict[str, Any]:
    """Return the entries of a dictionary that are None, numbers, text or lists of these, and the settings of a sampler.

    {} for any other value.
    """
    found: dict[str, Any] = {}
    for key, entry in value.items() if isinstance(value, dict) else ():
        entry = list(entry) if isinstance(entry, tuple) else entry
        if key == SAMPLING and isinstance(entry, dict):
            found[key] = plain(entry)
        elif isinstance(key, str) and (all(map(_simple, entry)) if isinstance(entry, list) else _simple(entry)):
            found[key] = entry
    return found


def _simple(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def listed(content: Mapping[Any, Any]) -> str:
    """Return the first keys of a mapping, for messages."""
    return ", ".join(map(repr, list(content)[:8])) or "nothing"
