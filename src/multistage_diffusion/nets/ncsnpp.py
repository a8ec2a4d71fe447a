"""NCSN++ (Song et al. 2021, "Score-based generative modeling through SDEs"): FIR resampling and an input pyramid."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import NetworkConfig
from ..contracts import Conditioning
from .blocks import SQRT_HALF, Bottom, FIRDown, FIRUp, ImageConv, conv
from .unet import Decoder, Encoded, Encoder


class NCSNppEncoder(Encoder):
    """Adds the filtered image after each down block; includes the two bottom blocks with attention."""

    def __init__(self, config: NetworkConfig, stage: int, width: int) -> None:
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


class NCSNppDecoder(Decoder):
    """The plain decoder with FIR resampling."""

    def __init__(self, config: NetworkConfig, stage: int, encoder_width: int) -> None:
        super().__init__(config, stage, encoder_width, up=FIRUp)
