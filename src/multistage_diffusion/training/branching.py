"""One decoder for all stages at first, and later a copy of it for each (training.branch_at).

Early on every noise level teaches the same things, and a decoder learns sooner from all rows than from its own stage's
alone; later what one stage learns is in the others' way. While they are one, the decoders are the same module: whatever
samples or saves the network need not know.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

from torch import Tensor, nn

from ..nets.unet import MultiDecoderUNet

STAGE = re.compile(r"\b(encoders|decoders)\.(\d+)\.")


def tie(network: MultiDecoderUNet) -> None:
    """Make all stages share the first stage's decoder (and encoder, where each has its own)."""
    for parts in _lists(network):
        for stage in range(1, len(parts)):
            parts[stage] = parts[0]


def untie(network: MultiDecoderUNet) -> None:
    """Give every stage a copy of what all have shared."""
    for parts in _lists(network):
        for stage in range(1, len(parts)):
            parts[stage] = copy.deepcopy(parts[0])


def tied(network: MultiDecoderUNet) -> bool:
    """Tell whether the stages share their decoders."""
    return any(parts[1] is parts[0] for parts in _lists(network))


def of_first_stage(name: str) -> str:
    """Return the name of the first stage's tensor to which another stage's corresponds."""
    return STAGE.sub(r"\1.0.", name)


def grown(tensors: dict[str, Tensor], names: Iterator[str]) -> dict[str, Tensor]:
    """Return an optimiser's tensors of the first stage for every parameter name of all stages.

    Args:
        tensors: {"PARAMETER.FIELD": value} of the shared parameters.
        names: of all parameters, once the stages have their own.
    """
    fields: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, field = key.rsplit(".", 1)
        fields.setdefault(name, {})[field] = value
    return {
        f"{name}.{field}": value.clone()
        for name in names
        for field, value in fields.get(of_first_stage(name), {}).items()
    }


def _lists(network: MultiDecoderUNet) -> Iterator[nn.ModuleList]:
    yield from (parts for parts in (network.encoders, network.decoders) if len(parts) > 1)
