"""The U-Net of latent diffusion.

Source: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.network import FAMILIES
from ..contracts import Conditioning
from ..errors import require
from .blocks import BoxUp, GroupNorm, ImageConv, NoiseEmbedding, conv, cosines_first, linear
from .network import Block, Encoded
from .unet import UNetConfig

GROUPS = 32  # groups of every GroupNorm


@FAMILIES.add("ldm")
@dataclass(frozen=True, kw_only=True)
class LDMConfig(UNetConfig):
    """Settings of the U-Net of latent diffusion; widths must be multiples of 32, the groups of its GroupNorms.

    Attributes:
        head_channels: channels of an attention head; it must divide every width that attends (32 always does).
        decoder_attention: per stage, whether its decoder has attention, as in the published networks; None: all have.
    """

    head_channels: int = 32
    decoder_attention: tuple[bool, ...] | None = None

    title: ClassVar[str] = "LDM U-Net"
    resizable: ClassVar[bool] = True
    per_stage: ClassVar[tuple[str, ...]] = (*UNetConfig.per_stage, "decoder_attention")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.head_channels > 0, f"network.head_channels={self.head_channels} must be positive")
        mults = [mult for level, mult in enumerate(self.channel_mult) if self.attends(level)]
        # The middle of an encoder always has attention.
        attended = [width * mult for width in self.encoder_widths for mult in (*mults, self.channel_mult[-1])]
        for stage, width in enumerate(self.decoder_widths):
            attended += [width * mult for mult in mults if self.decoder_attends(stage)]
        for channels in attended:
            require(
                channels % self.head_channels == 0,
                f"network.head_channels={self.head_channels} does not divide {channels} channels that attend; use 32",
            )

    @property
    def max_norm_groups(self) -> int:
        """32."""
        return GROUPS

    def groups(self, channels: int) -> int:
        """Return 32."""
        return GROUPS

    def decoder_attends(self, stage: int) -> bool:
        """Return whether the decoder of a stage has attention."""
        return self.decoder_attention is None or self.decoder_attention[stage]

    def encoder(self, stage: int, width: int) -> nn.Module:
        """Build the encoder of a stage."""
        return LDMEncoder(self, width)

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        """Build the decoder of a stage."""
        return LDMDecoder(self, stage, encoder_width)

    def advice(self) -> list[str]:
        """Warn of GroupNorms of one channel per group, which erase what blocks add for noise and class."""
        if GROUPS not in (width * mult for width in self.decoder_widths for mult in self.channel_mult):
            return []
        return [
            f"network.family=ldm with {GROUPS} channels at a level: GroupNorm in {GROUPS} groups then erases what the "
            f"network is told of noise and class; use at least {2 * GROUPS}"
        ]


def group_norm32(channels: int) -> GroupNorm:
    """Return GroupNorm with 32 groups and eps 1e-5."""
    return GroupNorm(GROUPS, channels, eps=1e-5)


class HeadedAttention(nn.Module):
    """Multi-head self-attention over all pixels, then x + h.

    Each head has `head_channels` channels and scale head_channels^-1/2. The last layer is initialised to zero.
    """

    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = group_norm32(channels)
        self.qkv = linear(channels, 3 * channels)
        self.proj = linear(channels, channels, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        heads = self.qkv(tokens).unflatten(2, (-1, 3, self.head_channels))  # per head: q, k, v
        q, k, v = heads.permute(3, 0, 2, 1, 4)
        h = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + h.transpose(1, 2).view_as(x)
        return out


class LDMBlock(Block):
    """Residual block with two 3x3 convolutions, each after GroupNorm and SiLU, and optional attention at the end.

    The embedding is added between the convolutions. The residual sum is skip + h. The second convolution is
    initialised to zero. `head_channels` is the number of channels of an attention head, None for no attention.
    """

    def __init__(
        self, channels_in: int, channels_out: int, emb: int, dropout: float, head_channels: int | None = None
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm0 = group_norm32(channels_in)
        self.conv0 = conv(channels_in, channels_out)
        self.affine = linear(emb, channels_out)
        self.norm1 = group_norm32(channels_out)
        self.conv1 = conv(channels_out, channels_out, gain=0.0)
        self.skip = conv(channels_in, channels_out, 1) if channels_in != channels_out else None
        self.attention = HeadedAttention(channels_out, head_channels) if head_channels else None

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) and the activated embedding (B, emb) to (B, channels_out, H, W)."""
        h = self.conv0(F.silu(self.norm0(x))) + self.affine(emb)[:, :, None, None]
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        if self.skip is not None:
            x = self.skip(x)
        out: Tensor = x + h
        if self.attention is not None:
            out = self.attention(out)
        return out


class Middle(nn.Module):
    """A block, attention and a block at the lowest resolution."""

    def __init__(self, config: LDMConfig, channels: int, emb: int) -> None:
        super().__init__()
        self.block0 = LDMBlock(channels, channels, emb, config.dropout, config.head_channels)
        self.block1 = LDMBlock(channels, channels, emb, config.dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h: Tensor = self.block1(self.block0(x, emb), emb)
        return h


class LDMEncoder(nn.Module):
    """Embedding, input convolution, blocks per level, stride-2 convolutions between levels, and the middle."""

    def __init__(self, config: LDMConfig, width: int) -> None:
        super().__init__()
        emb, widths = 4 * width, [width * mult for mult in config.channel_mult]
        self.embedding = NoiseEmbedding(width, config.num_classes, config.augment_dim, features=cosines_first)
        self.conv_in = conv(config.channels, width, kind=ImageConv)
        self.downs = nn.ModuleList(conv(w, w, stride=2) for w in widths[:-1])
        self.levels = nn.ModuleList()
        for level, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            heads = config.head_channels if config.attends(level) else None
            inputs = [before] + [after] * (config.blocks_per_level - 1)
            self.levels.append(nn.ModuleList(LDMBlock(w, after, emb, config.dropout, heads) for w in inputs))
        self.middle = Middle(config, widths[-1], emb)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Encoded:
        """Encode x (B, C, H, W) at noise = the step of the discrete schedule (B,), which may be any real number."""
        emb = self.embedding(noise, cond)
        skips: list[Tensor] = [self.conv_in(x)]
        for i, level in enumerate(self.levels):
            if i:
                skips.append(self.downs[i - 1](skips[-1]))
            assert isinstance(level, nn.ModuleList)
            for block in level:
                skips.append(block(skips[-1], emb))
        return Encoded(h=self.middle(skips[-1], emb), skips=tuple(skips), emb=emb)


class LDMDecoder(nn.Module):
    """Blocks on [h, skip] per level, then GroupNorm, SiLU and a convolution.

    Between levels, nearest-neighbour interpolation doubles the size, followed by a 3x3 convolution. At the levels of
    `config.attention_factors` every block has attention, unless `config.decoder_attention` disables it for this stage.
    """

    def __init__(self, config: LDMConfig, stage: int, encoder_width: int) -> None:
        super().__init__()
        emb, mults, width = 4 * encoder_width, config.channel_mult, config.decoder_widths[stage]
        attention = config.decoder_attends(stage)
        skips = config.skip_widths(encoder_width)
        before = encoder_width * mults[-1]
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            heads = config.head_channels if attention and config.attends(level) else None
            blocks = nn.ModuleList()
            for _ in range(config.blocks_per_level + 1):
                blocks.append(LDMBlock(before + skips.pop(), width * mult, emb, config.dropout, heads))
                before = width * mult
            self.levels.append(blocks)
            if level:
                self.ups.append(nn.Sequential(BoxUp(before), conv(before, before)))
        self.norm_out = group_norm32(before)
        self.conv_out = conv(before, config.channels, gain=0.0)

    def forward(self, encoded: Encoded) -> Tensor:
        """Map the encoder's output for B rows to (B, C, H, W)."""
        h, emb, skips = encoded.h, encoded.emb, list(encoded.skips)
        for i, level in enumerate(self.levels):
            if i:
                h = self.ups[i - 1](h)
            assert isinstance(level, nn.ModuleList)
            for block in level:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
