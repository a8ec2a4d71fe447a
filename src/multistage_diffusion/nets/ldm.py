"""The U-Net of latent diffusion, and the variants of it that diffusers' UNet2DModel has.

Sources: Rombach et al. 2022, "High-resolution image synthesis with latent diffusion models"; Ho et al. 2020, "Denoising
diffusion probabilistic models" (one head, asymmetric padding); Dhariwal & Nichol 2021, "Diffusion models beat GANs on
image synthesis" (scale and shift).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.network import FAMILIES
from ..contracts import Conditioning
from ..errors import require
from .blocks import BoxUp, GroupNorm, ImageConv, NoiseEmbedding, conv, linear, ordered_sinusoids
from .network import Block, Encoded
from .unet import UNetConfig

GROUPS = 32  # groups of every GroupNorm


@FAMILIES.add("ldm")
@dataclass(frozen=True, kw_only=True)
class LDMConfig(UNetConfig):
    """Settings of the U-Net of latent diffusion; widths must be multiples of `group_count`.

    All defaults but head_channels' are latent diffusion's; other values are those of diffusers' UNet2DModel.

    Attributes:
        head_channels: channels of an attention head; it must divide every width that attends (32 always does). None: one
            head.
        decoder_attention: per stage, whether its decoder has attention, as in the published networks; None: all have.
        middle_attention: attention of the middle: "normalised" (after a GroupNorm), "plain" or "none".
        group_count: groups of every GroupNorm.
        norm_eps: epsilon of every GroupNorm.
        down_padding: zeros around the maps before a stride-2 convolution: "symmetric" (one on each side) or "asymmetric"
            (one below and on the right), as in DDPM.
        embedding_order: order of the noise level's sinusoids: "cos-sin" or "sin-cos".
        embedding_shift: their frequencies are 10000^(-i / (half - embedding_shift)), i < half.
        scale_shift: whether blocks multiply by 1 + a and add b after their second GroupNorm, with (a, b) of the
            embedding, instead of adding to its input.
        label_embedding: what a class label is added to: the "input" of the embedding's layers, or their "output".
    """

    head_channels: int | None = 32
    decoder_attention: tuple[bool, ...] | None = None
    middle_attention: Literal["normalised", "plain", "none"] = "normalised"
    group_count: int = GROUPS
    norm_eps: float = 1e-5
    down_padding: Literal["symmetric", "asymmetric"] = "symmetric"
    embedding_order: Literal["cos-sin", "sin-cos"] = "cos-sin"
    embedding_shift: int = 0
    scale_shift: bool = False
    label_embedding: Literal["input", "output"] = "input"

    title: ClassVar[str] = "LDM U-Net"
    resizable: ClassVar[bool] = True
    per_stage: ClassVar[tuple[str, ...]] = (*UNetConfig.per_stage, "decoder_attention")

    def __post_init__(self) -> None:
        require(self.group_count > 0, f"network.group_count={self.group_count} must be positive")
        super().__post_init__()
        require(0 < self.norm_eps < 1, f"network.norm_eps={self.norm_eps} must be in (0, 1)")
        require(
            self.embedding_shift in (0, 1),
            f"network.embedding_shift={self.embedding_shift} must be 0 or 1",
        )
        if self.head_channels is not None:
            self._check_heads(self.head_channels)

    def _check_heads(self, head_channels: int) -> None:
        """Check that the channels of a head divide every width that attends."""
        require(head_channels > 0, f"network.head_channels={head_channels} must be positive")
        mults = [mult for level, mult in enumerate(self.channel_mult) if self.attends(level)]
        middle = () if self.middle_attention == "none" else (self.channel_mult[-1],)
        attended = [width * mult for width in self.encoder_widths for mult in (*mults, *middle)]
        for stage, width in enumerate(self.decoder_widths):
            attended += [width * mult for mult in mults if self.decoder_attends(stage)]
        for channels in attended:
            require(
                channels % head_channels == 0,
                f"network.head_channels={head_channels} does not divide {channels} channels that attend; use 32",
            )

    @property
    def max_norm_groups(self) -> int:
        """The groups of every GroupNorm."""
        return self.group_count

    def groups(self, channels: int) -> int:
        """Return the groups of a GroupNorm, whatever its channels."""
        return self.group_count

    def norm(self, channels: int) -> GroupNorm:
        """Return a GroupNorm."""
        return GroupNorm(self.group_count, channels, eps=self.norm_eps)

    def features(self, noise: Tensor, width: int) -> Tensor:
        """Return the sinusoids of noise (B,): shape (B, width), in noise's dtype."""
        return ordered_sinusoids(
            noise, width, cosines_first=self.embedding_order == "cos-sin", shift=self.embedding_shift
        )

    def block(
        self,
        channels_in: int,
        channels_out: int,
        emb: int,
        *,
        attention: bool = False,
        attention_norm: Callable[[int], nn.Module] | None = None,
    ) -> LDMBlock:
        """Build a block, with attention if asked for; its norm is a GroupNorm, unless given."""
        return LDMBlock(
            channels_in,
            channels_out,
            emb,
            self.dropout,
            (self.head_channels or channels_out) if attention else None,
            norm=self.norm,
            attention_norm=attention_norm,
            scale_shift=self.scale_shift,
        )

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
        groups = self.group_count
        if groups not in (width * mult for width in self.decoder_widths for mult in self.channel_mult):
            return []
        if self.scale_shift:  # the embedding acts after the GroupNorm
            return []
        return [
            f"network.family=ldm with {groups} channels at a level: GroupNorm in {groups} groups then erases what the "
            f"network is told of noise and class; use at least {2 * groups}"
        ]


def group_norm32(channels: int) -> GroupNorm:
    """Return GroupNorm with 32 groups and eps 1e-5."""
    return GroupNorm(GROUPS, channels, eps=1e-5)


class AsymmetricDown(nn.Conv2d):
    """A stride-2 convolution after padding with one row of zeros below and one column on the right, as in DDPM."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H / 2, W / 2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class HeadedAttention(nn.Module):
    """Multi-head self-attention over all pixels, then x + h.

    Each head has `head_channels` channels and scale head_channels^-1/2. The last layer is initialised to zero.
    """

    def __init__(self, channels: int, head_channels: int, norm: Callable[[int], nn.Module] = group_norm32) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = norm(channels)
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

    The embedding is added between the convolutions; with `scale_shift`, it scales and shifts the second GroupNorm's
    output. The residual sum is skip + h. The second convolution is initialised to zero. `head_channels` is the number of
    channels of an attention head, None for no attention; `attention_norm` is its norm, if not `norm`.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        emb: int,
        dropout: float,
        head_channels: int | None = None,
        *,
        norm: Callable[[int], nn.Module] = group_norm32,
        attention_norm: Callable[[int], nn.Module] | None = None,
        scale_shift: bool = False,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.norm0 = norm(channels_in)
        self.conv0 = conv(channels_in, channels_out)
        self.scale_shift = scale_shift
        self.affine = linear(emb, channels_out * (2 if scale_shift else 1))
        self.norm1 = norm(channels_out)
        self.conv1 = conv(channels_out, channels_out, gain=0.0)
        self.skip = conv(channels_in, channels_out, 1) if channels_in != channels_out else None
        self.attention = HeadedAttention(channels_out, head_channels, attention_norm or norm) if head_channels else None

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) and the activated embedding (B, emb) to (B, channels_out, H, W)."""
        h, told = self.conv0(F.silu(self.norm0(x))), self.affine(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = told.chunk(2, dim=1)
            h = self.norm1(h) * (1 + scale) + shift
        else:
            h = self.norm1(h + told)
        h = self.conv1(self.dropout(F.silu(h)))
        if self.skip is not None:
            x = self.skip(x)
        out: Tensor = x + h
        if self.attention is not None:
            out = self.attention(out)
        return out


class Middle(nn.Module):
    """A block, attention (unless config.middle_attention is "none") and a block at the lowest resolution."""

    def __init__(self, config: LDMConfig, channels: int, emb: int) -> None:
        super().__init__()
        plain = config.middle_attention == "plain"
        self.block0 = config.block(
            channels,
            channels,
            emb,
            attention=config.middle_attention != "none",
            attention_norm=nn.Identity if plain else None,
        )
        self.block1 = config.block(channels, channels, emb)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h: Tensor = self.block1(self.block0(x, emb), emb)
        return h


class LDMEncoder(nn.Module):
    """Embedding, input convolution, blocks per level, stride-2 convolutions between levels, and the middle."""

    def __init__(self, config: LDMConfig, width: int) -> None:
        super().__init__()
        emb, widths = 4 * width, [width * mult for mult in config.channel_mult]
        self.embedding = NoiseEmbedding(
            width,
            config.num_classes,
            config.augment_dim,
            features=config.features,
            late_labels=config.label_embedding == "output",
        )
        self.conv_in = conv(config.channels, width, kind=ImageConv)
        down = partial(conv, stride=2, pad=False, kind=AsymmetricDown)
        if config.down_padding == "symmetric":
            down = partial(conv, stride=2)
        self.downs = nn.ModuleList(down(w, w) for w in widths[:-1])
        self.levels = nn.ModuleList()
        for level, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            inputs = [before] + [after] * (config.blocks_per_level - 1)
            attends = config.attends(level)
            self.levels.append(nn.ModuleList(config.block(w, after, emb, attention=attends) for w in inputs))
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
            attends = attention and config.attends(level)
            blocks = nn.ModuleList()
            for _ in range(config.blocks_per_level + 1):
                blocks.append(config.block(before + skips.pop(), width * mult, emb, attention=attends))
                before = width * mult
            self.levels.append(blocks)
            if level:
                self.ups.append(nn.Sequential(BoxUp(before), conv(before, before)))
        self.norm_out = config.norm(before)
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
