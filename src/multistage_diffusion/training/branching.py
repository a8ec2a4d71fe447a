"""Branching: all stages share one decoder until step training.branch_at, then each stage gets its own copy.

Early in training all noise levels need similar features, so a decoder learns faster from the rows of all stages. Later
the stages interfere with one another. Until branching, all decoders are the same module object, so sampling and saving
work unchanged. Then the trainer builds a network with a decoder for each stage and loads copies of weights, averages
and optimiser state into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nets import MultiDecoderNetwork

STAGE = re.compile(r"\b(encoders|decoders)\.(\d+)\.")


def tie(network: MultiDecoderNetwork) -> None:
    """Make all stages share the first stage's decoder (and its encoder, if each stage has one)."""
    for parts in _lists(network):
        for stage in range(1, len(parts)):
            parts[stage] = parts[0]


def tied(network: MultiDecoderNetwork) -> bool:
    """Tell whether the stages share their decoders."""
    return any(parts[1] is parts[0] for parts in _lists(network))


def of_first_stage(name: str) -> str:
    """Return the name of the first stage's tensor that corresponds to a tensor of any stage."""
    return STAGE.sub(r"\1.0.", name)


def load_shared(network: nn.Module, shared: Mapping[str, Tensor]) -> None:
    """Load the weights of stages that share a decoder into a network in which each stage has its own.

    Args:
        network: may lack stages.
        shared: weights by name.
    """
    network.load_state_dict({name: shared[of_first_stage(name)] for name in network.state_dict()})


def optimizer_states(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, dict[str, Any]]:
    """Return the optimiser's state of each parameter by its name; parameters that were never updated have none."""
    return {name: optimizer.state[p] for name, p in module.named_parameters() if p in optimizer.state}


def load_shared_states(
    optimizer: torch.optim.Optimizer, module: nn.Module, shared: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give each parameter a copy of the optimiser's state of the corresponding shared parameter.

    Args:
        optimizer: optimiser over the module's parameters, in which each stage has its own decoder.
        module: the network.
        shared: see `optimizer_states`, from before branching.
    """
    for name, parameter in module.named_parameters():
        state = shared.get(of_first_stage(name))
        if state is not None:
            optimizer.state[parameter] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}


def _lists(network: MultiDecoderNetwork) -> Iterator[nn.ModuleList]:
    yield from (parts for parts in (network.encoders, network.decoders) if len(parts) > 1)
