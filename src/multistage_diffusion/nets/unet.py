"""A U-Net with one shared encoder and one decoder per stage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import NetworkConfig
from ..contracts import Conditioning
from ..errors import UserError
from .blocks import TINY, ImageConv, NoiseEmbedding, ResidualBlock, conv, group_norm


@dataclass(frozen=True)
class Encoded:
    """The encoder output that a decoder receives for the same rows.

    Attributes:
        h: lowest-resolution features (B, C, h, w).
        skips: feature maps in the order of computation; a decoder consumes them from the end.
        emb: activated embedding (B, 4 encoder_width).
    """

    h: Tensor
    skips: tuple[Tensor, ...]
    emb: Tensor

    def split(self, counts: Sequence[int]) -> list[Encoded]:
        """Return consecutive groups of rows; each map is split once, so its backward pass is one concatenation."""
        if len(counts) == 1:
            return [self]
        groups = zip(*(part.split_with_sizes(list(counts)) for part in (self.h, self.emb, *self.skips)), strict=True)
        return [Encoded(h=h, skips=tuple(skips), emb=emb) for h, emb, *skips in groups]


class Encoder(nn.Module):
    """Embedding, input convolution, blocks per level and down blocks between levels; families define `forward`."""

    def __init__(self, config: NetworkConfig, width: int, down: Callable[[int], nn.Module]) -> None:
        super().__init__()
        emb, widths = 4 * width, [width * mult for mult in config.channel_mult]
        self.embedding = NoiseEmbedding(width, config.num_classes, config.augment_dim)
        self.conv_in = conv(config.channels, width, kind=ImageConv)
        self.downs = nn.ModuleList(
            ResidualBlock(w, w, emb, config.dropout, resample=down(w), groups=config.norm_groups) for w in widths[:-1]
        )
        self.levels = nn.ModuleList()
        for level, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            self.levels.append(EncoderLevel(config, before, after, emb, attention=attends(config, level)))


class EncoderLevel(nn.Module):
    """The blocks of one encoder resolution."""

    def __init__(self, config: NetworkConfig, before: int, width: int, emb: int, *, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            ResidualBlock(
                width if i else before, width, emb, config.dropout, attention=attention, groups=config.norm_groups
            )
            for i in range(config.blocks_per_level)
        )

    def forward(self, h: Tensor, emb: Tensor) -> list[Tensor]:
        """Return the output of every block."""
        outputs = []
        for block in self.blocks:
            h = block(h, emb)
            outputs.append(h)
        return outputs


class Decoder(nn.Module):
    """Blocks on [h, skip] per level, up blocks between levels, then GroupNorm, SiLU and a convolution."""

    def __init__(self, config: NetworkConfig, stage: int, encoder_width: int, up: Callable[[int], nn.Module]) -> None:
        super().__init__()
        emb, mults, width = 4 * encoder_width, config.channel_mult, config.decoder_widths[stage]
        skips = skip_widths(config, encoder_width)
        before = encoder_width * mults[-1]
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            after = width * mult
            popped = [skips.pop() for _ in range(config.blocks_per_level + 1)]
            self.levels.append(DecoderLevel(config, before, after, popped, emb, attention=attends(config, level)))
            if level:
                block = ResidualBlock(after, after, emb, config.dropout, resample=up(after), groups=config.norm_groups)
                self.ups.append(block)
            before = after
        self.norm_out = group_norm(before, config.norm_groups)
        self.conv_out = conv(before, config.channels, gain=TINY)

    def forward(self, encoded: Encoded) -> Tensor:
        """Map the encoder's output for B rows to (B, C, H, W)."""
        h, emb, skips = encoded.h, encoded.emb, list(encoded.skips)
        for i, level in enumerate(self.levels):
            if i:
                h = self.ups[i - 1](h, emb)
            h = level(h, skips, emb)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class DecoderLevel(nn.Module):
    """The blocks of one decoder resolution; with `attention`, the last block has attention."""

    def __init__(
        self, config: NetworkConfig, before: int, width: int, skips: list[int], emb: int, *, attention: bool
    ) -> None:
        super().__init__()
        last = len(skips) - 1
        self.blocks = nn.ModuleList(
            ResidualBlock(
                (width if i else before) + skip,
                width,
                emb,
                config.dropout,
                attention=attention and i == last,
                groups=config.norm_groups,
            )
            for i, skip in enumerate(skips)
        )

    def forward(self, h: Tensor, skips: list[Tensor], emb: Tensor) -> Tensor:
        """Run the blocks; each block removes one map from the end of `skips`."""
        for block in self.blocks:
            h = block(torch.cat([h, skips.pop()], dim=1), emb)
        return h


def attends(config: NetworkConfig, level: int) -> bool:
    """Return whether the blocks of a level have attention; level 0 is full resolution."""
    return 2**level in config.attention_factors


def skip_widths(config: NetworkConfig, width: int) -> list[int]:
    """Return the widths of an encoder's skips in order: input convolution, then for each level [down block,] blocks."""
    widths = [width]
    for level, mult in enumerate(config.channel_mult):
        down = [width * config.channel_mult[level - 1]] if level else []
        widths += down + [width * mult] * config.blocks_per_level
    return widths


class MultiDecoderUNet(nn.Module):
    """One shared encoder (or, with `config.separate`, one per stage) and one decoder per stage.

    It does not depend on schedules or stage edges: the caller passes the number of rows for each decoder.

    Args:
        config: widths and depth.
        encoder: builds an encoder, (x, noise, cond) -> Encoded, from (config, stage index, width); the shared encoder
            gets stage index 0.
        decoder: builds the decoder of a stage, Encoded -> output, from (config, stage index, encoder width).
    """

    def __init__(
        self,
        config: NetworkConfig,
        encoder: Callable[[NetworkConfig, int, int], nn.Module],
        decoder: Callable[[NetworkConfig, int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.config = config
        stages = range(len(config.decoder_widths))
        widths = config.decoder_widths if config.separate else (config.encoder_width,)
        self.encoders = nn.ModuleList(encoder(config, k, width) for k, width in enumerate(widths))
        self.decoders = nn.ModuleList(decoder(config, k, widths[k if config.separate else 0]) for k in stages)

    def forward(self, x: Tensor, noise: Tensor, counts: Sequence[int], cond: Conditioning | None = None) -> Tensor:
        """Run the encoder on all rows and each decoder on the rows of its stage.

        A shared encoder runs once. Separate encoders run on the rows of their stage.

        Args:
            x: (B, C, H, W), already multiplied by c_in, rows sorted by stage. H and W are arbitrary: the network pads
                them (by replication) to a multiple of 2^(levels - 1) and crops its output.
            noise: (B,), the family's c_noise: 999 t for NCSN++, ln(sigma) / 4 for DDPM++ as in EDM, the step for the
                LDM U-Net.
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
        multiple = 2 ** (len(self.config.channel_mult) - 1)
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
