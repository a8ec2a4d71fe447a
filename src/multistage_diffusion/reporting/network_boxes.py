"""The boxes in a drawing of a network of any family, found by running it on the meta device."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..config.network import NetworkConfig
from ..nets.network import Encoded, MultiDecoderNetwork, blocks_of, meta_network, meta_run, tensors_in

ATTENTION = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
Size = tuple[int, ...]  # (height, width) of feature maps, or (number of tokens,)


@dataclass(frozen=True, kw_only=True)
class Box:
    """Blocks of an encoder or decoder that a drawing shows as one.

    Attributes:
        size: of the output of its last block.
        channels: of the same.
        attention: whether a block has attention.
        blocks: their number.
    """

    size: Size
    channels: int
    attention: bool
    blocks: int


@dataclass(frozen=True, kw_only=True)
class Boxes:
    """The boxes of each encoder and decoder, downwards: an encoder computes in this order, a decoder in the opposite one.

    Attributes:
        encoders: one shared, or one for each stage.
        decoders: one for each stage.
        skips: number of skip connections of each size, from one encoder.
    """

    encoders: list[list[Box]]
    decoders: list[list[Box]]
    skips: Counter[Size]


@dataclass
class _Run:
    """What is seen of a module while the network runs."""

    module: nn.Module
    attention: bool = False
    size: Size = ()
    channels: int = 0


@dataclass
class _Watch(TorchFunctionMode):
    """Notes when modules run, in this order, and inside which of them attention is computed."""

    runs: list[_Run] = field(default_factory=list)
    inside: list[_Run] = field(default_factory=list)
    skips: Counter[Size] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        for run in self.inside if func in ATTENTION else ():
            run.attention = True
        return func(*args, **(kwargs or {}))

    def enter(self, module: nn.Module, _: Any) -> None:
        self.inside.append(_Run(module))
        self.runs.append(self.inside[-1])

    def leave(self, _: nn.Module, __: Any, output: Any) -> None:
        run = self.inside.pop()
        run.size, run.channels = _size(tensors_in(output)[0])

    def encoded(self, _: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Encoded):
            self.skips = Counter(_size(skip)[0] for skip in output.skips)


def _size(features: Tensor) -> tuple[Size, int]:
    """Return size and channels of maps (B, C, H, W), tokens (B, N, C) or vectors (B, C)."""
    if features.ndim == 4:
        return tuple(features.shape[2:]), features.shape[1]
    return (features.shape[1] if features.ndim == 3 else 1,), features.shape[-1]


def network_boxes(config: NetworkConfig, height: int, width: int) -> Boxes:
    """Return the boxes of a network for inputs of height x width pixels, which are padded as the network pads them."""
    network = meta_network(config)
    with _watched(network) as watch:
        meta_run(network, height, width, [1] * len(network.decoders))
    boxes = partial(_boxes, config, watch.runs)
    return Boxes(
        encoders=[list(boxes(encoder)) for encoder in network.encoders],
        decoders=[list(boxes(decoder))[::-1] for decoder in network.decoders],
        skips=watch.skips,
    )


@contextmanager
def _watched(network: MultiDecoderNetwork) -> Iterator[_Watch]:
    """Yield a watch of all modules that are in boxes; the network is for this only."""
    watch = _Watch()
    for encoder in network.encoders:
        encoder.register_forward_hook(watch.encoded)
    for part in network.parts().values():
        for module in itertools.chain(*_grouped(network.config, part)):
            module.register_forward_pre_hook(watch.enter)
            module.register_forward_hook(watch.leave)
    with watch:
        yield watch


def _grouped(config: NetworkConfig, part: nn.Module) -> Sequence[Sequence[nn.Module]]:
    """Return the modules to watch: those the family names, else the blocks, else the part itself."""
    return config.boxes(part) or [list(blocks_of(part)) or [part]]


def _boxes(config: NetworkConfig, runs: Sequence[_Run], part: nn.Module) -> Iterator[Box]:
    """Yield the boxes of a part in the order of computation."""
    groups = _grouped(config, part)
    place = {id(module): number for number, group in enumerate(groups) for module in group}
    own = [run for run in runs if id(run.module) in place]
    by_size = config.boxes(part) is None

    def key(run: _Run) -> Any:
        return run.size if by_size else place[id(run.module)]

    for _, members in itertools.groupby(own, key):
        box = list(members)
        yield Box(
            size=box[-1].size,
            channels=box[-1].channels,
            attention=any(run.attention for run in box),
            blocks=len(box),
        )
