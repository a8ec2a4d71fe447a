"""DDPM++ as in EDM (Karras et al. 2022): box resampling, no pyramid, bottom blocks in the decoders."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..config import NetworkConfig
from ..contracts import Conditioning
from .blocks import Bottom, BoxDown, BoxUp
from .unet import Decoder, Encoded, Encoder


class DDPMppEncoder(Encoder):
    """Levels of blocks, connected by down blocks."""

    def __init__(self, config: NetworkConfig, stage: int, width: int) -> None:
        super().__init__(config, width, down=BoxDown)

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

    def __init__(self, config: NetworkConfig, stage: int, encoder_width: int) -> None:
        super().__init__(config, stage, encoder_width, up=BoxUp)
        self.bottom = Bottom(
            encoder_width * config.channel_mult[-1], 4 * encoder_width, config.dropout, config.norm_groups
        )

    def forward(self, encoded: Encoded) -> Tensor:
        """Map the encoder's output for B rows to (B, C, H, W)."""
        return super().forward(replace(encoded, h=self.bottom(encoded.h, encoded.emb)))
