"""Settings of the U-Net families, and the checks that their GroupNorms need."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from ..config.network import NetworkConfig
from ..errors import require
from .blocks import GROUPS, group_count
from .network import blocks_of


@dataclass(frozen=True, kw_only=True)
class UNetConfig(NetworkConfig):
    """Widths and depth of a U-Net whose encoder and decoders have the same levels; the embedding is 4 times as wide.

    Attributes:
        channel_mult: width factor per level; each level halves the resolution of the one before.
        blocks_per_level: residual blocks per encoder level (a decoder has one more).
        attention_factors: downsample factors of blocks with attention (1 is full resolution).
    """

    channel_mult: tuple[int, ...] = (1, 2, 2, 2)
    blocks_per_level: int = 4
    attention_factors: tuple[int, ...] = (2,)

    in_shapes: ClassVar[tuple[str, ...]] = ("channel_mult", "blocks_per_level", "attention_factors")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.channel_mult) > 0, "network.channel_mult must name at least one level")
        require(self.blocks_per_level > 0, f"network.blocks_per_level={self.blocks_per_level} must be positive")
        factors = [2**level for level in range(len(self.channel_mult))]
        for factor in self.attention_factors:
            require(
                factor in factors,
                f"network.attention_factors={list(self.attention_factors)}: {factor} is not a level's downsample "
                f"factor ({', '.join(map(str, factors))})",
            )
        require(min(self.channel_mult) > 0, f"network.channel_mult={list(self.channel_mult)} must be positive")
        self.require_buildable(
            ("channel_mult: factor", max(self.channel_mult), 1000),
            ("channel_mult: levels", len(self.channel_mult), 16),
            ("blocks_per_level", self.blocks_per_level, 1000),
        )
        self._check_widths()

    @property
    def max_norm_groups(self) -> int:
        """The most groups of a GroupNorm."""
        return GROUPS

    def groups(self, channels: int) -> int:
        """Return the groups of a GroupNorm."""
        return group_count(channels, self.max_norm_groups)

    def _check_widths(self) -> None:
        """Check that the groups of every GroupNorm divide its channels."""
        for name, width in self.named_widths():
            even = max(4, width + width % 2)
            require(width == even, f"{name} must be even and at least 4, such as {even}")
            # The first block of an encoder gets the bare width from the input convolution.
            for mult in (*((1,) if width in self.encoder_widths else ()), *self.channel_mult):
                channels, groups = width * mult, self.groups(width * mult)
                require(
                    channels % groups == 0,
                    f"{name} x {mult} = {channels} channels is not divisible into {groups} groups for "
                    f"GroupNorm; use a multiple of {4 if groups < self.max_norm_groups else groups}",
                )
        for decoder in self.decoder_widths:
            encoder = decoder if self.separate else self.encoder_width
            for channels in self._joined_channels(encoder, decoder):
                require(
                    channels % self.groups(channels) == 0,
                    f"network: encoder width {encoder} and decoder width {decoder} meet in {channels} channels, not "
                    f"divisible into {self.groups(channels)} groups for GroupNorm; use multiples of {self.max_norm_groups}",
                )

    def _joined_channels(self, encoder: int, decoder: int) -> list[int]:
        """Return the channels of [h, skip] at the start of a decoder's blocks; the lowest h has the encoder's width."""
        joined = [2 * encoder * self.channel_mult[-1]]
        for mult, mult_before in zip(self.channel_mult, (1, *self.channel_mult), strict=False):
            joined.append(decoder * mult + encoder * mult_before)  # skip of the down block or input convolution
            if self.blocks_per_level > 1:
                joined.append(decoder * mult + encoder * mult)
        return joined

    def attends(self, level: int) -> bool:
        """Return whether the blocks of a level have attention; level 0 is full resolution."""
        return 2**level in self.attention_factors

    def skip_widths(self, width: int) -> list[int]:
        """Return the widths of an encoder's skips in order: input convolution, then per level [down block,] blocks."""
        widths = [width]
        for level, mult in enumerate(self.channel_mult):
            down = [width * self.channel_mult[level - 1]] if level else []
            widths += down + [width * mult] * self.blocks_per_level
        return widths

    @property
    def multiple(self) -> int:
        """2^(levels - 1): every level but the first halves the sides."""
        return int(2 ** (len(self.channel_mult) - 1))

    def require_size(self, height: int, width: int) -> None:
        """Raise UserError if there are so many levels that the network would pad its input to twice its side or more."""
        side, levels = max(height, width), len(self.channel_mult)
        require(
            self.multiple < 2 * side,
            f"network.channel_mult={list(self.channel_mult)} has {levels} levels, each half the size of the one "
            f"before, for sides of {side}; give at most {(2 * side - 1).bit_length()} levels",
        )

    def counted_layers(self, part: nn.Module) -> Iterable[nn.Module]:
        """Return the 2-d convolutions, which the paper counts."""
        return [module for module in part.modules() if isinstance(module, nn.Conv2d)]

    def elements(self, height: int, width: int) -> int:
        """Estimate what is held at a time: all encoder maps, which a decoder needs later, and the working set of a block.

        That is its input, in some blocks concatenated with a skip, and a few maps of its own.
        """
        mults, most = self.channel_mult, 0.0
        areas = [height * width / 4**level for level in range(len(mults))]
        for decoder in self.decoder_widths:
            encoder = decoder if self.separate else self.encoder_width
            waiting = sum(
                (self.blocks_per_level + 1) * encoder * m * area for m, area in zip(mults, areas, strict=True)
            )
            before = [*mults[1:], mults[-1]]  # the first block of a level has the width of the level below
            works = max(
                area * (2 * (max(decoder * b, encoder) + encoder * m) + 4 * decoder * max(m, b))
                for m, b, area in zip(mults, before, areas, strict=True)
            )
            most = max(most, waiting + works)
        return int(most)

    def boxes(self, part: nn.Module) -> Sequence[Sequence[nn.Module]]:
        """Return the blocks of each level, and those of the middle; blocks between levels are not drawn."""
        children = dict(part.named_children())
        levels = [list(blocks_of(level)) for level in children.pop("levels").children()]
        middle = [
            block for name, child in children.items() if name not in ("downs", "ups") for block in blocks_of(child)
        ]
        return [*levels, middle] if middle else levels
