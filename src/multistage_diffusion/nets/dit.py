"""DiT (Peebles and Xie 2023, "Scalable diffusion models with transformers"): blocks with adaLN-Zero.

The first blocks are the encoder that all stages share, the others a stage's decoder. With one decoder of the encoder's width
this is the published network, whose blocks are those of both.
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
from .blocks import check_augmentation, cosines_first, linear, no_autocast
from .network import Block
from .transformer import (
    LEAST_EPS,
    MLP,
    Patches,
    SelfAttention,
    Tokens,
    TransformerConfig,
    label_rows,
    sincos_positions,
    token_norm,
    unpatched,
)

FREQUENCIES = 256  # sines and cosines of the noise


@FAMILIES.add("dit")
@dataclass(frozen=True, kw_only=True)
class DiTConfig(TransformerConfig):
    """Settings of a DiT; positions are sines and cosines, which are no weights.

    Attributes:
        freq_shift: of the noise's frequencies 10000^(-i / (128 - freq_shift)): 0 in the original, 1 in diffusers.
        norm_eps: eps of the norm before an MLP: 1e-6 in the original, 1e-5 in diffusers. Other norms have 1e-6.
        learned_sigma: keep the outputs for a learnt variance, which published weights have, as weights; they do not
            take part in training or sampling.
    """

    freq_shift: float = 0.0
    norm_eps: float = LEAST_EPS
    learned_sigma: bool = False

    title: ClassVar[str] = "DiT"
    in_shapes: ClassVar[tuple[str, ...]] = (*TransformerConfig.in_shapes, "learned_sigma")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.freq_shift <= 1, f"network.freq_shift={self.freq_shift} must be in [0, 1]")
        require(0 < self.norm_eps <= 1, f"network.norm_eps={self.norm_eps} must be in (0, 1]")

    def encoder(self, stage: int, width: int) -> nn.Module:
        """Build the encoder of a stage."""
        return DiTEncoder(self, stage, width)

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        """Build the decoder of a stage."""
        return DiTDecoder(self, stage, encoder_width)


def zero_linear(features_in: int, features_out: int) -> nn.Linear:
    """Return a linear layer of zeros."""
    return linear(features_in, features_out, gain=0.0)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, N, D) times 1 + scale plus shift, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


class DiTEmbedding(nn.Module):
    """Embeds noise level, class labels and augmentation labels into one vector per row."""

    def __init__(self, config: DiTConfig, width: int) -> None:
        super().__init__()
        self.shift, self.classes = config.freq_shift, config.num_classes
        self.linear0, self.linear1 = linear(FREQUENCIES, width), linear(width, width)
        self.label = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.augment = linear(config.augment_dim, width, bias=False) if config.augment_dim else None
        tables = [] if self.label is None else [self.label.weight]
        for weight in (self.linear0.weight, self.linear1.weight, *tables):
            nn.init.normal_(weight, std=0.02)

    def forward(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """Return the embedding (B, width) after a SiLU, with which all blocks begin, in the network's dtype.

        Args:
            noise: (B,), the family's c_noise; any float dtype.
            cond: labels (B,) int64 in [-1, num_classes), -1 for no label; augment (B, augment_dim).

        Raises:
            UserError: if labels do not fit the network.
        """
        dtype, rows = self.linear0.weight.dtype, len(noise)
        labels = label_rows(cond, rows, self.classes, noise.device)
        check_augmentation(cond, rows, self.augment.in_features if self.augment is not None else 0)
        with no_autocast(noise.device):
            waves = cosines_first(noise.to(torch.promote_types(dtype, torch.float32)), FREQUENCIES, self.shift)
            emb = self.linear1(F.silu(self.linear0(waves.to(dtype))))
            if self.label is not None:
                emb = emb + self.label(labels)
            if self.augment is not None and cond.augment is not None:
                emb = emb + self.augment(cond.augment.to(dtype))
            return F.silu(emb)


class DiTBlock(Block):
    """Attention and MLP, each after a norm that the embedding shifts and scales, and times a gate that starts at zero."""

    def __init__(self, config: DiTConfig, width: int, emb: int, head_channels: int) -> None:
        super().__init__()
        self.modulation = zero_linear(emb, 6 * width)
        self.norm0 = token_norm(config.norm, width, affine=False)
        self.attention = SelfAttention(width, head_channels, bias=True, qk_norm=config.qk_norm)
        self.norm1 = token_norm(config.norm, width, eps=config.norm_eps, affine=False)
        self.mlp = MLP(width, config.mlp_ratio, approximate="tanh")
        self.dropout = nn.Dropout(config.dropout)
        _initialise(self.attention, self.mlp)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map tokens (B, N, D) and the activated embedding (B, E) to tokens (B, N, D)."""
        shift0, scale0, gate0, shift1, scale1, gate1 = self.modulation(emb).chunk(6, dim=1)
        h = self.attention(modulated(self.norm0(x), shift0, scale0))
        x = x + gate0[:, None] * self.dropout(h)
        h = self.mlp(modulated(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate1[:, None] * self.dropout(h)
        return out


def _initialise(*modules: nn.Module) -> None:
    """Draw the weights of linear layers as in `blocks.linear`."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


class DiTEncoder(nn.Module):
    """Embedding, patches with positions, and the first blocks."""

    positions: Tensor

    def __init__(self, config: DiTConfig, stage: int, width: int) -> None:
        super().__init__()
        self.patch, self.base = config.patch, config.grid
        self.embedding = DiTEmbedding(config, width)
        self.patches = Patches(config.channels, config.patch, width)
        self.register_buffer("positions", sincos_positions(width, self.base, self.base), persistent=False)
        head = config.encoder_head(stage)
        self.blocks = nn.ModuleList(DiTBlock(config, width, width, head) for _ in range(config.encoder_depth))
        _initialise(self.patches)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tokens:
        """Encode x (B, C, H, W) at noise = c_noise (B,): the step of a discrete schedule, 999 t or ln(sigma) / 4."""
        grid, emb = (x.shape[2] // self.patch, x.shape[3] // self.patch), self.embedding(noise, cond)
        positions = self.positions
        if grid != self.base:
            positions = sincos_positions(positions.shape[2], grid, self.base).to(positions)
        h = self.patches(x) + positions
        for block in self.blocks:
            h = block(h, emb)
        return Tokens(h=h, skips=(), emb=emb, grid=grid)


class DiTDecoder(nn.Module):
    """A map to the decoder's width if that is another, the last blocks, then a modulated norm and a linear layer."""

    def __init__(self, config: DiTConfig, stage: int, encoder_width: int) -> None:
        super().__init__()
        self.patch, self.channels = config.patch, config.channels
        width, outputs = config.decoder_widths[stage], config.channels * (1 + config.learned_sigma)
        self.map = linear(encoder_width, width) if width != encoder_width else None
        head = config.decoder_head(stage)
        self.blocks = nn.ModuleList(DiTBlock(config, width, encoder_width, head) for _ in range(config.depth(stage)))
        self.modulation = zero_linear(encoder_width, 2 * width)
        self.norm = token_norm(config.norm, width, affine=False)
        self.linear = zero_linear(width, outputs * config.patch**2)

    def forward(self, encoded: Tokens) -> Tensor:
        """Map the encoder's output for B rows to (B, C, H, W)."""
        h, emb = encoded.h, encoded.emb
        if self.map is not None:
            h = self.map(h)
        for block in self.blocks:
            h = block(h, emb)
        shift, scale = self.modulation(emb).chunk(2, dim=1)
        out = self.linear(modulated(self.norm(h), shift, scale))
        return unpatched(out, encoded.grid, self.patch)[:, : self.channels]
