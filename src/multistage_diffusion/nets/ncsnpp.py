"""NCSN++ (Song et al. 2021, "Score-based generative modeling through SDEs"): FIR resampling and an input pyramid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ..config.network import FAMILIES
from ..contracts import Conditioning
from .blocks import SQRT_HALF, Bottom, FIRDown, FIRUp, ImageConv, conv
from .network import Encoded
from .song import Decoder, Encoder, SongUNetConfig


@FAMILIES.add("ncsnpp")
@dataclass(frozen=True, kw_only=True)
class NCSNppConfig(SongUNetConfig):
    """Settings of an NCSN++."""

    title: ClassVar[str] = "NCSN++"

    def encoder(self, stage: int, width: int) -> nn.Module:
        """Build the encoder of a stage."""
        return NCSNppEncoder(self, width)

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        """Build the decoder of a stage."""
        return Decoder(self, stage, encoder_width, up=FIRUp)

    def counted_layers(self, part: nn.Module) -> Iterable[nn.Module]:
        """Return the 2-d convolutions but those of the pyramid, and no projections of attention, as the paper counts."""
        pyramid = [step.conv for step in part.modules() if isinstance(step, PyramidStep)]
        return [layer for layer in super().counted_layers(part) if layer not in pyramid]


class NCSNppEncoder(Encoder):
    """Adds the filtered image after each down block; includes the two bottom blocks with attention."""

    def __init__(self, config: NCSNppConfig, width: int) -> None:
        super().__init__(config, width, down=FIRDown)
        widths = [width * mult for mult in config.channel_mult]
        self.pyramid = nn.ModuleList(
            PyramidStep(before, after) for before, after in zip([config.channels, *widths], widths[:-1], strict=False)
        )
        self.bottom = Bottom(widths[-1], 4 * width, config.dropout, config.norm_groups)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Encoded:
        """Encode x (B, C, H, W) at noise = 999 t (B,)."""
        emb = self.embedding(noise, cond)
        skips: list[Tensor] = [self.conv_in(x)]
        pyramid = x
        for i, level in enumerate(self.levels):
            if i:
                pyramid = (self.pyramid[i - 1](pyramid) + self.downs[i - 1](skips[-1], emb)).mul_(SQRT_HALF)
                skips.append(pyramid)
            skips += level(skips[-1], emb)
        return Encoded(h=self.bottom(skips[-1], emb), skips=tuple(skips), emb=emb)


class PyramidStep(nn.Module):
    """FIR filter with padding 2, then a 3x3 convolution with stride 2 and no padding: halves the size."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.filter = FIRDown(channels_in, stride=1, padding=2)
        self.conv = conv(channels_in, channels_out, stride=2, pad=False, kind=ImageConv)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) to (B, channels_out, H / 2, W / 2)."""
        out: Tensor = self.conv(self.filter(x))
        return out
