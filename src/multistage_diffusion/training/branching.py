"""Branching: all stages share one decoder until step training.branch_at, then each stage gets its own copy.

Early in training all noise levels need similar features, so a decoder learns faster from the rows of all stages. Later
the stages interfere with one another. Until branching, all decoders are the same module object, so sampling and saving
work unchanged.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator

from torch import Tensor, nn

from ..nets import MultiDecoderNetwork

STAGE = re.compile(r"\b(encoders|decoders)\.(\d+)\.")


def tie(network: MultiDecoderNetwork) -> None:
    """Make all stages share the first stage's decoder (and its encoder, if each stage has one)."""
    for parts in _lists(network):
        for stage in range(1, len(parts)):
            parts[stage] = parts[0]


def untie(network: MultiDecoderNetwork) -> None:
    """Give every other stage its own copy of the shared decoder (and encoder)."""
    for parts in _lists(network):
        for stage in range(1, len(parts)):
            parts[stage] = copy.deepcopy(parts[0])


def tied(network: MultiDecoderNetwork) -> bool:
    """Tell whether the stages share their decoders."""
    return any(parts[1] is parts[0] for parts in _lists(network))


def of_first_stage(name: str) -> str:
    """Return the name of the first stage's tensor that corresponds to a tensor of any stage."""
    return STAGE.sub(r"\1.0.", name)


def grown(tensors: dict[str, Tensor], names: Iterator[str]) -> dict[str, Tensor]:
    """Copy the optimiser's tensors of the first stage to the corresponding parameters of all stages.

    Args:
        tensors: {"PARAMETER.FIELD": value} of the shared parameters.
        names: names of all parameters after branching.

    Returns:
        {"PARAMETER.FIELD": copy} for the parameters in names.
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


def _lists(network: MultiDecoderNetwork) -> Iterator[nn.ModuleList]:
    yield from (parts for parts in (network.encoders, network.decoders) if len(parts) > 1)
