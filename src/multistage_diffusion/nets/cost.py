"""Parameter and FLOP counts of a network, computed on the meta device without weights or real computation."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..config import NetworkConfig
from ..errors import UserError
from . import MultiDecoderUNet, build_network
from .blocks import Attention
from .ncsnpp import PyramidStep

BACKWARD = 2  # backward FLOPs over forward FLOPs: a layer computes gradients of its input and of its weights


@dataclass(frozen=True, kw_only=True)
class StageCost:
    """Cost of one stage for one image: its encoder and decoder together.

    Attributes:
        stage: 1 for the lowest noise.
        parameters: of encoder and decoder.
        multiply_adds: in the paper's convention, which counts 2-d convolutions only. NCSN++: without the 1x1
            projections of attention and without the pyramid's convolutions. DDPM++: all, including projections. LDM:
            without projections. MEME (the paper gives no rule): all, including the 1x1 convolutions of mixers and of
            their attention.
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
    with torch.device("meta"):
        network = build_network(config).eval()
    encoder_adds, encoder_flops, stages = 0, 0, []
    for index in range(len(config.decoder_widths)):
        flops, encoder_flops, encoder_adds, decoder_adds = _count_stage(network, index, height, width)
        encoder = network.encoders[index if config.separate else 0]
        stages.append(
            StageCost(
                stage=index + 1,
                parameters=_parameters(encoder) + _parameters(network.decoders[index]),
                multiply_adds=encoder_adds + decoder_adds,
                true_flops=flops,
            )
        )
    return NetworkCost(
        shared_parameters=0 if config.separate else _parameters(network.encoders[0]),
        shared_multiply_adds=0 if config.separate else encoder_adds,
        shared_true_flops=0 if config.separate else encoder_flops,
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


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _count_stage(network: MultiDecoderUNet, stage: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (total true FLOPs, encoder's true FLOPs, encoder's multiply-adds, decoder's multiply-adds) of one image.

    Multiply-adds follow the paper's convention.
    """
    x = torch.empty(1, network.config.channels, height, width, device="meta")
    noise = torch.empty(1, device="meta")
    counts = [int(k == stage) for k in range(len(network.decoders))]
    family, flop_counter = network.config.family, FlopCounterMode(display=False)
    count_encoder, count_decoder = _counted(network.encoders, family), _counted(network.decoders, family)
    with count_encoder as encoder, count_decoder as decoder, torch.no_grad(), flop_counter:
        network(x, noise, counts)
    own = f"{type(network).__name__}.encoders.{stage if network.config.separate else 0}"
    encoder_flops = sum(flop_counter.get_flop_counts()[own].values())
    return flop_counter.get_total_flops(), encoder_flops, sum(encoder), sum(decoder)


@contextmanager
def _counted(part: nn.Module, family: str) -> Iterator[list[int]]:
    """Yield a list that collects the multiply-adds of the counted layers of `part` as they run."""
    counted: list[int] = []

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(layer.weight, Tensor)
        # Each output element takes one multiply-add per weight of its output channel.
        counted.append(output.numel() * layer.weight[0].numel())

    hooks = [layer.register_forward_hook(note) for layer in _counted_layers(part, family)]
    try:
        yield counted
    finally:
        for hook in hooks:
            hook.remove()


def _counted_layers(part: nn.Module, family: str) -> Iterator[nn.Module]:
    """Yield the layers that the paper's convention counts (the linear layers of attention are 1x1 convolutions)."""
    for child in part.children():
        if isinstance(child, Attention):
            yield from (child.qkv, child.proj) if family == "ddpmpp" else ()
        elif isinstance(child, nn.Conv2d):
            yield child
        elif not isinstance(child, PyramidStep):
            yield from _counted_layers(child, family)
