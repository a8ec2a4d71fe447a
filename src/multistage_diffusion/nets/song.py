"""What NCSN++ and DDPM++ share; both are of Song et al. 2021, and EDM's code calls them SongUNet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import require
from .blocks import GROUPS, TINY, ImageConv, NoiseEmbedding, ResidualBlock, conv, group_norm
from .network import Encoded
from .unet import UNetConfig


@dataclass(frozen=True, kw_only=True)
class SongUNetConfig(UNetConfig):
    """Settings that NCSN++ and DDPM++ share.

    Attributes:
        norm_groups: a GroupNorm has min(channels // 4, norm_groups) groups: 16 in the published multi-stage networks,
            32 in those of score_sde and EDM.
    """

    norm_groups: int = GROUPS

    resizable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.norm_groups > 0, f"network.norm_groups={self.norm_groups} must be positive")
        super().__post_init__()

    @property
    def max_norm_groups(self) -> int:
        """The setting norm_groups."""
        return self.norm_groups


class Encoder(nn.Module):
    """Embedding, input convolution, blocks per level and down blocks between levels; families define `forward`."""

    def __init__(self, config: SongUNetConfig, width: int, down: Callable[[int], nn.Module]) -> None:
        super().__init__()
        emb, widths = 4 * width, [width * mult for mult in config.channel_mult]
        self.embedding = NoiseEmbedding(width, config.num_classes, config.augment_dim)
        self.conv_in = conv(config.channels, width, kind=ImageConv)
        self.downs = nn.ModuleList(
            ResidualBlock(w, w, emb, config.dropout, resample=down(w), groups=config.norm_groups) for w in widths[:-1]
        )
        self.levels = nn.ModuleList()
        for level, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            self.levels.append(EncoderLevel(config, before, after, emb, attention=config.attends(level)))


class EncoderLevel(nn.Module):
    """The blocks of one encoder resolution."""

    def __init__(self, config: SongUNetConfig, before: int, width: int, emb: int, *, attention: bool) -> None:
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

    def __init__(self, config: SongUNetConfig, stage: int, encoder_width: int, up: Callable[[int], nn.Module]) -> None:
        super().__init__()
        emb, mults, width = 4 * encoder_width, config.channel_mult, config.decoder_widths[stage]
        skips = config.skip_widths(encoder_width)
        before = encoder_width * mults[-1]
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            after = width * mult
            popped = [skips.pop() for _ in range(config.blocks_per_level + 1)]
            self.levels.append(DecoderLevel(config, before, after, popped, emb, attention=config.attends(level)))
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
        self, config: SongUNetConfig, before: int, width: int, skips: list[int], emb: int, *, attention: bool
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
