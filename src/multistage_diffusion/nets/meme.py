"""The iU-Net of MEME (Lee et al., AAAI 2024, "Multi-architecture multi-expert diffusion models").

From the paper: four experts on equal time intervals share no weights. Every expert is a U-Net that mixes positions as
the Inception Transformer does (Si et al. 2022): channels are divided between a high-frequency mixer (max-pooling,
depthwise convolution) and a low-frequency mixer (self-attention on an average-pooled map) and then fused. The noisier
an expert's interval, the larger its low-frequency share.

Chosen here, because no configuration for CIFAR-10 is published: the U-Net around the mixers is that of DDPM++
(embedding, residual blocks, 2x2 resampling, GroupNorm, initialisation). A mixer replaces the attention of DDPM++ after
the two convolutions of a block, and is present in every block of the configured levels, including the decoder's. The
share of an expert is the same at every level (in the paper it also grows with depth). Attention has one head. It acts
on a map pooled 2x2 at full resolution, and on the unpooled map at lower resolutions.
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
from .blocks import SQRT_HALF, TINY, BoxDown, BoxUp, ImageConv, NoiseEmbedding, ResidualBlock, conv, group_norm
from .network import Block, Encoded
from .unet import UNetConfig


@FAMILIES.add("meme")
@dataclass(frozen=True, kw_only=True)
class MEMEConfig(UNetConfig):
    """Settings of MEME's experts, which need network.separate=true; at attention_factors their blocks have mixers.

    The paper counts 2-d convolutions; it gives no rule for mixers, whose 1x1 convolutions, also of attention, count here.

    Attributes:
        attention_shares: per stage, the share of a mixer's channels that attention mixes, such as
            (0.125, 0.375, 0.625, 0.875); convolution mixes the others.
    """

    attention_shares: tuple[float, ...] | None = None

    title: ClassVar[str] = "MEME's iU-Net"
    per_stage: ClassVar[tuple[str, ...]] = (*UNetConfig.per_stage, "attention_shares")

    def __post_init__(self) -> None:
        super().__post_init__()
        stages, shares = len(self.decoder_widths), self.attention_shares
        require(
            self.separate or stages == 1,
            f"network.separate={self.separate}: the {stages} experts of network.family=meme share nothing; set it to true",
        )
        require(
            shares is not None and all(0 <= share <= 1 for share in shares),
            f"network.attention_shares={shares and list(shares)} needs a number in [0, 1] for each of the {stages} stages: "
            "the share of channels that attend",
        )

    def share(self, stage: int) -> float:
        """Return the share of channels that attention mixes."""
        assert self.attention_shares is not None
        return self.attention_shares[stage]

    def encoder(self, stage: int, width: int) -> nn.Module:
        """Build the encoder of a stage."""
        return MEMEEncoder(self, stage, width)

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        """Build the decoder of a stage."""
        return MEMEDecoder(self, stage, encoder_width)

    def notes(self, stage: int) -> list[str]:
        """Return the share of attention."""
        return [f"attention: {100 * self.share(stage):.3g} % of channels"]


def depthwise(channels: int) -> nn.Conv2d:
    """Return a depthwise 3x3 convolution with Xavier-uniform weights (fan-in and fan-out 9) and zero biases."""
    layer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
    nn.init.uniform_(layer.weight, -(3**-0.5), 3**-0.5)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


class PooledAttention(nn.Module):
    """Low-frequency mixer: pool x pool average pooling, one attention head, nearest-neighbour upsampling."""

    def __init__(self, channels: int, pool: int) -> None:
        super().__init__()
        self.down = nn.AvgPool2d(pool, ceil_mode=True) if pool > 1 else nn.Identity()
        self.up = nn.Upsample(scale_factor=float(pool)) if pool > 1 else nn.Identity()
        self.qkv = conv(channels, 3 * channels, 1)
        self.proj = conv(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape; incomplete pooling windows at the border average what they contain."""
        pooled = self.down(x)
        q, k, v = self.qkv(pooled).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        tokens = F.scaled_dot_product_attention(q, k, v).squeeze(1)
        out: Tensor = self.up(self.proj(tokens.transpose(1, 2).view_as(pooled)))
        return out[..., : x.shape[2], : x.shape[3]]


class InceptionMixer(nn.Module):
    """Mixes positions by max-pooling, convolution and attention on separate channels, then fuses (Si et al. 2022).

    With x = [a, b, c] along the channels, y = [FC(max-pool(a)), depthwise(FC(b)), attention(c)] and the result is
    FC(y + depthwise(y)). FC is a 1x1 convolution; the last one is initialised near zero.

    Args:
        channels: even.
        share: share of the channels in c, in [0, 1]; the channel number is rounded to an even number. a and b have half
            of the other channels each. At 0 positions mix within two pixels only; at 1 there is no high-frequency
            mixer.
        pool: side of the average-pooling windows before attention.
    """

    def __init__(self, channels: int, share: float, pool: int) -> None:
        super().__init__()
        low = 2 * round(share * channels / 2)
        half = (channels - low) // 2
        self.sizes = [half, half, low]
        self.pooled = conv(half, half, 1) if half else None
        self.convolved = nn.Sequential(conv(half, half, 1), depthwise(half)) if half else None
        self.attention = PooledAttention(low, pool) if low else None
        self.local = depthwise(channels)
        self.proj = conv(channels, channels, 1, gain=TINY)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        a, b, c = x.split_with_sizes(self.sizes, dim=1)
        parts = []
        if self.pooled is not None and self.convolved is not None:
            parts += [self.pooled(F.max_pool2d(a, 3, stride=1, padding=1)), self.convolved(b)]
        if self.attention is not None:
            parts.append(self.attention(c))
        y = torch.cat(parts, dim=1)
        out: Tensor = self.proj(y + self.local(y))
        return out


class MEMEBlock(Block):
    """A residual block, followed by GroupNorm, a mixer and (x + h) / sqrt(2) if `share` is given."""

    def __init__(
        self, channels_in: int, channels: int, emb: int, dropout: float, share: float | None = None, pool: int = 1
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(channels_in, channels, emb, dropout)
        self.mixer = (
            None if share is None else nn.Sequential(group_norm(channels), InceptionMixer(channels, share, pool))
        )

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) and the activated embedding (B, emb) to (B, channels, H, W)."""
        h: Tensor = self.block(x, emb)
        return h if self.mixer is None else (h + self.mixer(h)).mul_(SQRT_HALF)


def level_blocks(config: MEMEConfig, stage: int, level: int, inputs: list[int], width: int, emb: int) -> nn.ModuleList:
    """Return an expert's blocks at a level: one per entry of `inputs` (input channels), with `width` outputs."""
    share = config.share(stage) if config.attends(level) else None
    return nn.ModuleList(MEMEBlock(w, width, emb, config.dropout, share, pool_size(level)) for w in inputs)


def pool_size(level: int) -> int:
    """Return the pooling size of attention: 2 at full resolution (16x16 positions for 32x32 images), else 1."""
    return 2 if level == 0 else 1


class MEMEEncoder(nn.Module):
    """Embedding, input convolution, blocks per level, down blocks between levels, and two blocks at the bottom.

    The first bottom block always has a mixer.
    """

    def __init__(self, config: MEMEConfig, stage: int, width: int) -> None:
        super().__init__()
        emb, widths = 4 * width, [width * mult for mult in config.channel_mult]
        self.embedding = NoiseEmbedding(width, config.num_classes, config.augment_dim)
        self.conv_in = conv(config.channels, width, kind=ImageConv)
        self.downs = nn.ModuleList(ResidualBlock(w, w, emb, config.dropout, resample=BoxDown(w)) for w in widths[:-1])
        self.levels = nn.ModuleList()
        for level, (before, after) in enumerate(zip([width, *widths], widths, strict=False)):
            inputs = [before] + [after] * (config.blocks_per_level - 1)
            self.levels.append(level_blocks(config, stage, level, inputs, after, emb))
        share, pool = config.share(stage), pool_size(len(widths) - 1)
        self.bottom0 = MEMEBlock(widths[-1], widths[-1], emb, config.dropout, share, pool)
        self.bottom1 = MEMEBlock(widths[-1], widths[-1], emb, config.dropout)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Encoded:
        """Encode x (B, C, H, W) at noise (B,): 999 t, or the c_noise of another preconditioning."""
        emb = self.embedding(noise, cond)
        skips: list[Tensor] = [self.conv_in(x)]
        for i, level in enumerate(self.levels):
            if i:
                skips.append(self.downs[i - 1](skips[-1], emb))
            assert isinstance(level, nn.ModuleList)
            for block in level:
                skips.append(block(skips[-1], emb))
        h = self.bottom1(self.bottom0(skips[-1], emb), emb)
        return Encoded(h=h, skips=tuple(skips), emb=emb)


class MEMEDecoder(nn.Module):
    """Blocks on [h, skip] per level, up blocks between levels, then GroupNorm, SiLU and a convolution."""

    def __init__(self, config: MEMEConfig, stage: int, encoder_width: int) -> None:
        super().__init__()
        emb, mults, width = 4 * encoder_width, config.channel_mult, config.decoder_widths[stage]
        skips = config.skip_widths(encoder_width)
        before = encoder_width * mults[-1]
        self.levels, self.ups = nn.ModuleList(), nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            after = width * mult
            inputs = [h + skips.pop() for h in [before] + [after] * config.blocks_per_level]
            self.levels.append(level_blocks(config, stage, level, inputs, after, emb))
            if level:
                self.ups.append(ResidualBlock(after, after, emb, config.dropout, resample=BoxUp(after)))
            before = after
        self.norm_out = group_norm(before)
        self.conv_out = conv(before, config.channels, gain=TINY)

    def forward(self, encoded: Encoded) -> Tensor:
        """Map the encoder's output for B rows to (B, C, H, W)."""
        h, emb, skips = encoded.h, encoded.emb, list(encoded.skips)
        for i, level in enumerate(self.levels):
            if i:
                h = self.ups[i - 1](h, emb)
            assert isinstance(level, nn.ModuleList)
            for block in level:
                h = block(torch.cat([h, skips.pop()], dim=1), emb)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
