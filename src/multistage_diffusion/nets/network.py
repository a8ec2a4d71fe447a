"""The network of any family: a shared encoder, one decoder per stage, and blocks that can be computed again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..config.network import NetworkConfig
from ..contracts import Conditioning
from ..errors import UserError
from ..memory import require_memory

COUNTED = 512  # networks with a setting of this size are counted before they are built, which takes a second at most
BUFFER_COPIES = 3  # buffers such as positions are computed in float64, then rounded


class Block(nn.Module):
    """A piece of an encoder or decoder that is recomputed, compiled and drawn as a whole.

    Subclasses define `compute`, from tensors to a tensor. Blocks inside a block belong to it.
    """

    recompute = False  # whether the backward pass recomputes the block instead of storing its activations
    compute: Callable[..., Tensor]

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return what `compute` returns."""
        if self.recompute and self.training and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.compute, *inputs, use_reentrant=False)
            return out
        return self.compute(*inputs)


def blocks_of(module: nn.Module) -> Iterator[Block]:
    """Yield the blocks of a module, without those inside a block."""
    if isinstance(module, Block):
        yield module
        return
    for child in module.children():
        yield from blocks_of(child)


@dataclass(frozen=True)
class Encoded:
    """The encoder output that a decoder receives for the same rows.

    Attributes:
        h: features after the encoder's last block, (B, ...).
        skips: features in the order of computation; a decoder consumes them from the end.
        emb: activated embedding (B, E).
    """

    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor

    def split(self, counts: Sequence[int]) -> list[Encoded]:
        """Return consecutive groups of rows; each map is split once, so its backward pass is one concatenation."""
        if len(counts) == 1:
            return [self]
        groups = zip(*(part.split_with_sizes(list(counts)) for part in (self.h, self.emb, *self.skips)), strict=True)
        return [dataclasses.replace(self, h=h, skips=tuple(skips), emb=emb) for h, emb, *skips in groups]


class MultiDecoderNetwork(nn.Module):
    """One shared encoder (or, with `config.separate`, one per stage) and one decoder per stage.

    It depends neither on the family nor on schedules or stage edges: the caller passes the number of rows for each
    decoder.

    Attributes:
        tied: whether the stages share one decoder or slices of it, see training.branching.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config, self.tied = config, False
        widths = config.encoder_widths
        self.encoders = nn.ModuleList(config.encoder(k, width) for k, width in enumerate(widths))
        self.decoders = nn.ModuleList(
            config.decoder(k, widths[k if config.separate else 0]) for k in range(len(config.decoder_widths))
        )

    def forward(self, x: Tensor, noise: Tensor, counts: Sequence[int], cond: Conditioning | None = None) -> Tensor:
        """Run the encoder on all rows and each decoder on the rows of its stage.

        A shared encoder runs once. Separate encoders run on the rows of their stage.

        Args:
            x: (B, C, H, W), already multiplied by c_in, rows sorted by stage. H and W are arbitrary: the network pads
                them (by replication) to a multiple of `config.multiple` and crops its output.
            noise: (B,), the preconditioning's c_noise: 999 t or the step for noise prediction, ln(sigma) / 4 for EDM.
            counts: rows of each stage, lowest noise first, with sum B. A decoder without rows is not called, so it gets
                no gradient.
            cond: class and augmentation labels of each row, or None.

        Returns:
            (B, C, H, W), the raw network output; reduced precision under autocast.

        Raises:
            UserError: if shapes or counts disagree, or labels are invalid (see NoiseEmbedding).
        """
        self._check(x, noise, counts)
        cond = cond or Conditioning()
        busy = [stage for stage, count in enumerate(counts) if count]
        rows = [counts[stage] for stage in busy]
        padded = self._pad(x)
        if self.config.separate:
            pieces = [
                self.encoders[k](padded[r], noise[r], cond.rows(r)) for k, r in zip(busy, _slices(rows), strict=True)
            ]
        else:
            pieces = self.encoders[0](padded, noise, cond).split(rows)
        outputs = [self.decoders[k](piece) for k, piece in zip(busy, pieces, strict=True)]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return out[..., : x.shape[2], : x.shape[3]]

    def parts(self) -> dict[str, nn.Module]:
        """Return the parts by name: "encoder" ("encoder.1", ... if separate), "decoder.1", ...; 1 is lowest noise."""
        if self.config.separate:
            encoders = {f"encoder.{k}": module for k, module in enumerate(self.encoders, start=1)}
        else:
            encoders = {"encoder": self.encoders[0]}
        return encoders | {f"decoder.{k}": module for k, module in enumerate(self.decoders, start=1)}

    def _pad(self, x: Tensor) -> Tensor:
        multiple = self.config.multiple
        bottom, right = -x.shape[2] % multiple, -x.shape[3] % multiple
        return F.pad(x, (0, right, 0, bottom), mode="replicate") if bottom or right else x

    def _check(self, x: Tensor, noise: Tensor, counts: Sequence[int]) -> None:
        if x.ndim != 4 or x.shape[1] != self.config.channels:
            raise UserError(f"x has shape {tuple(x.shape)}; the network needs (B, {self.config.channels}, H, W)")
        if noise.shape != x.shape[:1]:
            raise UserError(f"noise has shape {tuple(noise.shape)}; {len(x)} rows of x need ({len(x)},)")
        if len(counts) != len(self.decoders) or min(counts) < 0 or sum(counts) != len(x) or len(x) == 0:
            raise UserError(
                f"counts={list(counts)} must give the rows of each of the {len(self.decoders)} decoders: "
                f"numbers >= 0 whose sum is the batch, {len(x)} (at least 1)"
            )


def _slices(counts: Sequence[int]) -> list[slice]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def build_network(config: NetworkConfig) -> MultiDecoderNetwork:
    """Return a newly initialised network.

    Weights are drawn from torch's global generator. One decoder width gives the ordinary network of the family.
    `config.separate` gives one ordinary network per stage.

    Raises:
        UserError: if its weights need more memory than there is.
    """
    if torch.get_default_device().type == "cpu" and _largest(dataclasses.astuple(config)) >= COUNTED:
        _require_room(config)
    return MultiDecoderNetwork(config)


def _largest(settings: object) -> float:
    """Return the largest number in nested settings."""
    if isinstance(settings, tuple):
        return max(map(_largest, settings), default=0)
    return settings if isinstance(settings, int | float) else 0


def _require_room(config: NetworkConfig) -> None:
    """Refuse a network whose weights and buffers do not fit into memory, before any of it is allocated."""
    with torch.device("meta"):
        network = MultiDecoderNetwork(config)
    weights, buffers = dict(network.named_parameters()), dict(network.named_buffers())
    largest, tensor = max({**weights, **buffers}.items(), key=lambda item: item[1].numel())
    require_memory(
        sum(w.nbytes for w in weights.values()) + BUFFER_COPIES * sum(b.nbytes for b in buffers.values()),
        f"network.family={config.family!r}, whose largest tensor, {largest}, is {list(tensor.shape)},",
        "take a smaller width, depth, patch or size of the network",
    )


def meta_network(config: NetworkConfig) -> MultiDecoderNetwork:
    """Return a network on the meta device: its shapes and arithmetic, without weights or results."""
    with torch.device("meta"):
        network = build_network(config).eval()
    for module in network.modules():
        if isinstance(module, nn.GroupNorm):
            module.forward = torch.empty_like  # type: ignore[method-assign]  # PyTorch takes milliseconds for its shape
    return network


def meta_run(network: MultiDecoderNetwork, height: int, width: int, counts: Sequence[int]) -> None:
    """Run a network from `meta_network` on images of height x width pixels, so many of each stage."""
    with torch.device("meta"), torch.no_grad():
        network(torch.empty(sum(counts), network.config.channels, height, width), torch.empty(sum(counts)), counts)


def tensors_in(value: object) -> list[Tensor]:
    """Return the tensors in an encoder's result, in order: in tuples, lists, mappings and dataclasses."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = [getattr(value, f.name) for f in dataclasses.fields(value)]
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple | list) else ()
    return [tensor for element in inside for tensor in tensors_in(element)]
