"""Boxes are seen in the run of a network, whatever its family; test_network_layout.py compares them for the U-Nets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multistage_diffusion.config.network import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.nets.network import Block, Encoded
from multistage_diffusion.reporting.network_boxes import Box, network_boxes
from multistage_diffusion.reporting.network_layout import network_layout


class Apply(Block):
    """A block that is one function of tensors."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = function


def attend(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x, x)


class Tokens(nn.Module):
    """Tokens of 2x2 patches, one class token before them, and blocks; every block's output is a skip."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Encoded:
        h = F.unfold(x, 2, stride=2).transpose(1, 2)
        h = torch.cat([h.new_zeros(len(h), 1, h.shape[2]), h], dim=1)
        skips = []
        for block in self.blocks:
            h = block(h)
            skips.append(h)
        return Encoded(h=h, skips=tuple(skips), emb=noise[:, None])


class FromTokens(nn.Module):
    def __init__(self, blocks: list[nn.Module], side: int) -> None:
        super().__init__()
        self.blocks, self.side = nn.Sequential(*blocks), side

    def forward(self, encoded: Encoded) -> Tensor:
        h = self.blocks(encoded.h)[:, 1:].transpose(1, 2)
        return F.fold(h, self.side, 2, stride=2)


@dataclass(frozen=True, kw_only=True)
class Transformer(NetworkConfig):
    def encoder(self, stage: int, width: int) -> nn.Module:
        return Tokens([Apply(attend), Apply(torch.tanh), Apply(torch.tanh)])

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        return FromTokens([Apply(attend), Apply(torch.tanh)] if stage else [Apply(torch.tanh)], 8)


@dataclass(frozen=True, kw_only=True)
class Hourglass(NetworkConfig):
    """Down and up again inside each part, without skip connections; multi-head attention of torch in the middle."""

    def encoder(self, stage: int, width: int) -> nn.Module:
        attention = nn.MultiheadAttention(4, 1, batch_first=True)

        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.fine, self.coarse, self.again = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1)
                self.attention = attention
                middle = Apply(lambda h: self.coarse(F.avg_pool2d(h, 2)))
                self.blocks = nn.Sequential(
                    Apply(self.fine),
                    middle,
                    Apply(self.attend),
                    Apply(lambda h: self.again(F.interpolate(h, scale_factor=2.0))),
                )

            def attend(self, h: Tensor) -> Tensor:
                tokens = h.flatten(2).transpose(1, 2)
                return self.attention(tokens, tokens, tokens)[0].transpose(1, 2).view_as(h)

            def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tensor:
                return self.blocks(x)

        return Encoder()

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        return nn.Conv2d(6, 3, 1)


def test_a_transformer_s_blocks_share_a_box_of_tokens() -> None:
    found = network_boxes(Transformer(decoder_widths=(12, 12)), 8, 8)
    box = {"size": (17,), "channels": 12}
    assert found.encoders == [[Box(attention=True, blocks=3, **box)]]
    assert found.decoders == [[Box(attention=False, blocks=1, **box)], [Box(attention=True, blocks=2, **box)]]
    assert found.skips == Counter({(17,): 3})
    layout = network_layout(Transformer(decoder_widths=(12, 12)), 8, 8)
    (row,) = layout.rows
    assert (row.size, row.skips, row.middle) == ((17,), 3, False)
    assert row.height == pytest.approx(4 * layout.pixel)  # drawn as a square of tokens


@pytest.mark.parametrize("separate", [False, True])
def test_sizes_that_come_back_have_boxes_of_their_own(separate: bool) -> None:
    found = network_boxes(Hourglass(decoder_widths=(1, 1), separate=separate), 8, 4)
    encoder = [
        Box(size=(8, 4), channels=2, attention=False, blocks=1),
        Box(size=(4, 2), channels=4, attention=True, blocks=2),
        Box(size=(8, 4), channels=6, attention=False, blocks=1),
    ]
    assert found.encoders == [encoder] * (2 if separate else 1)
    assert found.decoders == [[Box(size=(8, 4), channels=3, attention=False, blocks=1)]] * 2  # as a whole: no blocks
    assert not found.skips
    rows = network_layout(Hourglass(separate=separate), 8, 4).rows
    assert [(row.size, row.middle) for row in rows] == [((8, 4), False), ((8, 4), False), ((4, 2), False)]
