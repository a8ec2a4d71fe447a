"""Parameter and FLOP counts of a network, computed on the meta device without weights or real computation."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import NetworkConfig
from ..errors import UserError
from .network import MultiDecoderNetwork, build_network, meta_network, meta_run, tensors_in

BACKWARD = 2  # backward FLOPs over forward FLOPs: a layer computes gradients of its input and of its weights


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of one stage for one image: its encoder and decoder together.

    Attributes:
        stage: 1 for the lowest noise.
        parameters: of encoder and decoder.
        multiply_adds: as the family's publications count them (`NetworkConfig.counted_layers`); the paper counts 2-d
            convolutions only. All, if the family says nothing.
        true_flops: 2 per multiply-add, for convolutions, FIR filters, linear layers and attention products.
    """

    stage: int
    parameters: int
    multiply_adds: int
    true_flops: int


@dataclass(frozen=True, kw_only=True)
class NetworkCost:
    """Cost of the whole network; the shared values are those of the shared encoder, 0 for separate networks."""

    shared_parameters: int
    shared_multiply_adds: int
    shared_true_flops: int
    total_parameters: int
    stages: tuple[StageCost, ...]


@functools.lru_cache(maxsize=512)  # a run calls it three times, a plan for hundreds of widths; a call takes up to 1 s
def network_cost(config: NetworkConfig, height: int, width: int) -> NetworkCost:
    """Return parameters, multiply-adds and FLOPs per stage for one image of height x width pixels.

    If the network pads this size, the padded size is counted.
    """
    network, shared, stages = meta_network(config), _Count(), []
    for index in range(len(config.decoder_widths)):
        encoder, decoder = _count_stage(network, index, height, width)
        shared = _Count() if config.separate else encoder
        stages.append(
            StageCost(
                stage=index + 1,
                parameters=encoder.parameters + decoder.parameters,
                multiply_adds=encoder.multiply_adds + decoder.multiply_adds,
                true_flops=encoder.flops + decoder.flops,
            )
        )
    return NetworkCost(
        shared_parameters=shared.parameters,
        shared_multiply_adds=shared.multiply_adds,
        shared_true_flops=shared.flops,
        total_parameters=_parameters(network),
        stages=tuple(stages),
    )


def weighted_multiply_adds(cost: NetworkCost, weights: Sequence[float]) -> float:
    """Return the mean multiply-adds of a denoiser call, weighted by how often each stage is called.

    Args:
        cost: the result of `network_cost`.
        weights: calls (or interval lengths) per stage, lowest noise first; only their ratios matter.

    Raises:
        UserError: if weights are not one number >= 0 per stage, or all are zero.
    """
    if len(weights) != len(cost.stages) or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(
            f"weights={list(weights)} must be one number >= 0 for each of the {len(cost.stages)} stages, not all zero"
        )
    total = sum(w * stage.multiply_adds for w, stage in zip(weights, cost.stages, strict=True))
    return total / sum(weights)


@functools.lru_cache(maxsize=64)
def feature_elements(config: NetworkConfig, height: int, width: int) -> int:
    """Estimate the most elements of features held at a time in a call without gradients, per image, for the largest stage.

    A decoder needs the encoder's whole result. Beside it, a layer holds its input and output, and the block around it
    about as much again.
    """
    known = config.elements(height, width)
    if known is not None:
        return known
    network = meta_network(config)
    waiting, working = [0], [0]

    def result(_: nn.Module, inputs: Any, output: Any) -> None:
        waiting.append(_numel(output))

    def layer(_: nn.Module, inputs: Any, output: Any) -> None:
        working.append(2 * _numel(inputs) + 4 * _numel(output))

    for encoder in network.encoders:
        encoder.register_forward_hook(result)
    for module in network.modules():
        if not any(module.children()):
            module.register_forward_hook(layer)
    for stage in range(len(network.decoders)):
        meta_run(network, height, width, _only(stage, network))
    return max(waiting) + max(working)


@functools.lru_cache(maxsize=64)
def saved_bytes(config: NetworkConfig, height: int, width: int) -> tuple[int, ...]:
    """Count the bytes that autograd keeps for the backward pass of one image in float32, by stage.

    Forward passes of the encoder and the stage's decoder are recorded on the meta device. The bytes of one image are the
    difference between two images and one, without what all images share.
    """
    with torch.device("meta"):
        network = build_network(config).train()

    def kept(rows: int, stage: int) -> int:
        stored: dict[int, Tensor] = {}  # holds the tensors, so that no other one takes their place

        def keep(tensor: Tensor) -> Tensor:
            return stored.setdefault(tensor.untyped_storage()._cdata, tensor)

        images, noise = (
            torch.empty(rows, config.channels, height, width, device="meta"),
            torch.empty(rows, device="meta"),
        )
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            network(images, noise, [rows * n for n in _only(stage, network)])
        return sum(tensor.untyped_storage().nbytes() for tensor in stored.values())

    return tuple(kept(2, stage) - kept(1, stage) for stage in range(len(network.decoders)))


def _numel(value: object) -> int:
    return sum(tensor.numel() for tensor in tensors_in(value))


@dataclass(frozen=True)
class _Count:
    """Counts of an encoder or a decoder for one image."""

    parameters: int = 0
    multiply_adds: int = 0
    flops: int = 0


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count_stage(network: MultiDecoderNetwork, stage: int, height: int, width: int) -> tuple[_Count, _Count]:
    """Return the counts of a stage's encoder and decoder."""
    config, place = network.config, stage if network.config.separate else 0
    encoder, decoder, flops = network.encoders[place], network.decoders[stage], FlopCounterMode(display=False)
    with _counted(config.counted_layers(encoder)) as above, _counted(config.counted_layers(decoder)) as below, flops:
        meta_run(network, height, width, _only(stage, network))
    own = sum(flops.get_flop_counts().get(f"{type(network).__name__}.encoders.{place}", {}).values())
    return _count(encoder, above, own), _count(decoder, below, flops.get_total_flops() - own)


def _only(stage: int, network: MultiDecoderNetwork) -> list[int]:
    return [int(k == stage) for k in range(len(network.decoders))]


def _count(part: nn.Module, multiply_adds: list[int] | None, flops: int) -> _Count:
    return _Count(_parameters(part), flops // 2 if multiply_adds is None else sum(multiply_adds), flops)


@contextmanager
def _counted(layers: Iterable[nn.Module] | None) -> Iterator[list[int] | None]:
    """Yield a list that collects the multiply-adds of the layers as they run; None for None."""
    counted: list[int] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        # Each output element takes one multiply-add per weight of its output channel.
        counted.append(output.numel() * layer.weight[0].numel())

    hooks = [layer.register_forward_hook(note) for layer in layers or ()]
    try:
        yield None if layers is None else counted
    finally:
        for hook in hooks:
            hook.remove()
