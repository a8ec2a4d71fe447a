"""DDPM++ as in EDM (Karras et al. 2022): box resampling, no pyramid, bottom blocks in the decoders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor, nn

from ..config.network import FAMILIES
from ..contracts import Conditioning
from .blocks import Attention, Bottom, BoxDown, BoxUp
from .network import Encoded
from .song import Decoder, Encoder, SongUNetConfig


@FAMILIES.add("ddpmpp")
@dataclass(frozen=True, kw_only=True)
class DDPMppConfig(SongUNetConfig):
    """Settings of a DDPM++."""

    title: ClassVar[str] = "DDPM++"

    def encoder(self, stage: int, width: int) -> nn.Module:
        """Build the encoder of a stage."""
        return DDPMppEncoder(self, width, down=BoxDown)

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        """Build the decoder of a stage."""
        return DDPMppDecoder(self, stage, encoder_width)

    def counted_layers(self, part: nn.Module) -> Iterable[nn.Module]:
        """Return the 2-d convolutions and the projections of attention: EDM's code has them as 1x1 convolutions."""
        attention = [module for module in part.modules() if isinstance(module, Attention)]
        return [*super().counted_layers(part), *(layer for a in attention for layer in (a.qkv, a.proj))]


class DDPMppEncoder(Encoder):
    """Levels of blocks, connected by down blocks."""

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Encoded:
        """Encode x (B, C, H, W), already multiplied by c_in, at noise = c_noise = ln(sigma) / 4 (B,)."""
        emb = self.embedding(noise, cond)
        skips: list[Tensor] = [self.conv_in(x)]
        for i, level in enumerate(self.levels):
            if i:
                skips.append(self.downs[i - 1](skips[-1], emb))
            skips += level(skips[-1], emb)
        return Encoded(h=skips[-1], skips=tuple(skips), emb=emb)


class DDPMppDecoder(Decoder):
    """Two bottom blocks with the encoder's width, then the plain decoder."""

    def __init__(self, config: DDPMppConfig, stage: int, encoder_width: int) -> None:
        super().__init__(config, stage, encoder_width, up=BoxUp)
        self.bottom = Bottom(
            encoder_width * config.channel_mult[-1], 4 * encoder_width, config.dropout, config.norm_groups
        )

    def forward(self, encoded: Encoded) -> Tensor:
        """Map the encoder's output for B rows to (B, C, H, W)."""
        return super().forward(replace(encoded, h=self.bottom(encoded.h, encoded.emb)))
