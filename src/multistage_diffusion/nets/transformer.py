"""What the families of transformers share: settings, patches, tokens, attention, and the MLP of a block."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.network import NetworkConfig
from ..contracts import Conditioning
from ..errors import require
from .blocks import check_augmentation, check_labels, linear, no_autocast, ordered_sinusoids
from .network import Encoded

ALIKE = 1.5  # largest factor between the ratios of depth to width that a plan compares
LEAST_EPS = 1e-6  # eps of norms that are not a setting


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(NetworkConfig):
    """Settings that all transformers share: an encoder of blocks that all stages share, then a stage's own blocks.

    Attributes:
        dropout: probability that an output of an attention or an MLP is dropped.
        patch: side of the patches that become tokens; inputs are padded to multiples of it.
        encoder_depth: blocks of the encoder.
        decoder_depths: blocks of each stage's decoder; None: as many as the encoder's.
        head_channels: channels of an attention head; it must divide the widths.
        decoder_head_channels: the same for each stage's decoder; None: head_channels.
        mlp_ratio: width of an MLP's hidden layer, as a multiple of the block's.
        norm: "layer" (LayerNorm, as published) or "rms" (RMSNorm: Zhang and Sennrich 2019), which subtracts no mean.
        qk_norm: normalise queries and keys of each head by their RMS, with learnt gains (Dehghani et al. 2023, Scaling
            vision transformers to 22 billion parameters): attention cannot saturate.
        size: (height, width) of the inputs whose positions the family defines; those of other sizes are interpolated.
    """

    dropout: float = 0.0
    patch: int = 2
    encoder_depth: int = 6
    decoder_depths: tuple[int, ...] | None = None
    head_channels: int = 64
    decoder_head_channels: tuple[int, ...] | None = None
    mlp_ratio: float = 4.0
    norm: Literal["layer", "rms"] = "layer"
    qk_norm: bool = False
    size: tuple[int, int] = (32, 32)

    per_stage: ClassVar[tuple[str, ...]] = (*NetworkConfig.per_stage, "decoder_depths", "decoder_head_channels")
    in_shapes: ClassVar[tuple[str, ...]] = ("patch", "encoder_depth", "mlp_ratio", "qk_norm")
    feature_maps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "encoder_depth", "head_channels"):
            require(getattr(self, name) > 0, f"network.{name}={getattr(self, name)} must be positive")
        for name in ("decoder_depths", "decoder_head_channels"):
            values = getattr(self, name)
            require(values is None or min(values) > 0, f"network.{name}={list(values or ())} must be positive")
        require(0 < self.mlp_ratio <= 100, f"network.mlp_ratio={self.mlp_ratio} must be in (0, 100]")
        require(min(self.size) > 0, f"network.size={list(self.size)} must be positive")
        stages = range(len(self.decoder_widths))
        self.require_buildable(
            ("patch", self.patch, 1000),
            ("encoder_depth", self.encoder_depth, 1000),
            ("decoder_depths: depth", max(map(self.depth, stages)), 1000),
            ("size: side", max(self.size), 100_000),
        )
        shared = [] if self.separate else [(self.head_channels, "head_channels")]
        own = "head_channels" if self.decoder_head_channels is None else "decoder_head_channels"
        heads = [*shared, *((self.decoder_head(stage), own) for stage in stages)]
        for (said, width), (head, name) in zip(self.named_widths(), heads, strict=True):
            step = math.lcm(head, 4)
            fitting = f"use a multiple of {step}, such as {max(1, round(width / step)) * step}"
            fits = max(n for n in range(1, min(head, width) + 1) if width % n == 0)
            require(
                width % head == 0,
                f"{said} is not divisible into heads of network.{name}={head}; {fitting}, or {name} such as {fits}",
            )
            require(width % 4 == 0, f"{said} must be a multiple of 4, which its positions need; {fitting}")

    def depth(self, stage: int) -> int:
        """Return the blocks of a stage's decoder."""
        return self.encoder_depth if self.decoder_depths is None else self.decoder_depths[stage]

    def decoder_head(self, stage: int) -> int:
        """Return the channels of a head in a stage's decoder."""
        return self.head_channels if self.decoder_head_channels is None else self.decoder_head_channels[stage]

    def encoder_head(self, stage: int) -> int:
        """Return the channels of a head in an encoder: a stage's own encoder has its decoder's heads."""
        return self.decoder_head(stage) if self.separate else self.head_channels

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an input of `size`."""
        return -(-self.size[0] // self.patch), -(-self.size[1] // self.patch)

    @property
    def multiple(self) -> int:
        """The side of a patch."""
        return self.patch

    def notes(self, stage: int) -> list[str]:
        """Return the blocks of a stage's decoder and the heads of each."""
        depth, heads = self.depth(stage), self.decoder_widths[stage] // self.decoder_head(stage)
        return [f"{depth} block{'s' * (depth > 1)}, {heads} head{'s' * (heads > 1)}"]

    def largest_decoders(self, stages: int) -> dict[str, Any]:
        """Return settings of so many decoders of the largest width and depth, with the heads of all or of the first."""
        depth = max(map(self.depth, range(len(self.decoder_widths))))
        heads = None if self.decoder_head_channels is None else (self.decoder_head_channels[0],) * stages
        own = {"decoder_depths": (depth,) * stages, "decoder_head_channels": heads}
        return {**super().largest_decoders(stages), **own}

    def decoder_choices(self, width: int) -> Sequence[dict[str, Any]]:
        """Return the depths whose ratio to the width is within ALIKE of the largest decoder's, at least the nearest one.

        Loss hardly depends on this ratio within a wide range (Kaplan et al. 2020, Scaling laws for neural language
        models, 3.1).
        """
        depth = max(map(self.depth, range(len(self.decoder_widths))))
        right = depth * width / max(self.decoder_widths)
        fitting = range(math.ceil(right / ALIKE), math.floor(right * ALIKE) + 1)
        return [{"decoder_depths": number} for number in fitting or (max(round(right), 1),)]


@dataclass(frozen=True)
class Tokens(Encoded):
    """An encoder's result as tokens.

    Attributes:
        h: tokens (B, N, D), those of the patches last, row by row.
        skips: tokens (B, N, D) after encoder blocks.
        emb: embedding of noise and labels (B, E).
        grid: rows and columns of patches.
    """

    grid: tuple[int, int]


def token_norm(kind: str, width: int, *, eps: float = LEAST_EPS, affine: bool) -> nn.Module:
    """Return a norm over the last dimension of tokens (B, N, width): "layer" or "rms"."""
    made = nn.RMSNorm if kind == "rms" else nn.LayerNorm
    return made(width, eps=eps, elementwise_affine=affine)


class Patches(nn.Module):
    """Maps images to one token for each patch, by a linear layer on its pixels."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.linear = nn.Linear(channels * patch * patch, width)

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Return the rows and columns of patches in images (B, C, H, W)."""
        return x.shape[2] // self.patch, x.shape[3] // self.patch

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W), sides multiples of the patch, to (B, H W / patch², width), row by row."""
        rows, channels, height, width = x.shape
        p = self.patch
        pixels = x.reshape(rows, channels, height // p, p, width // p, p).permute(0, 2, 4, 1, 3, 5)
        out: Tensor = self.linear(pixels.flatten(3).flatten(1, 2))
        return out


def unpatched(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """Map tokens (B, rows columns, patch² C), each [row, column, channel] of its pixels, to (B, C, H, W)."""
    pixels = tokens.reshape(len(tokens), *grid, patch, patch, -1)
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def sincos_positions(
    width: int, grid: tuple[int, int], base: tuple[int, int], device: torch.device | None = None
) -> Tensor:
    """Return 2-d sine-cosine positions (1, rows columns, width), float32 (He et al. 2022, Masked autoencoders).

    The first half is [sin, cos](column 10000^(-4 i / width)), i < width / 4, the second half that of the row.

    Args:
        width: a multiple of 4.
        grid: rows and columns.
        base: rows and columns of the grid whose positions are whole numbers; those of other grids cover its range.
        device: where they are computed, which saves a copy.
    """
    rows, columns = (_numbers(n, device) * (b / n) for n, b in zip(grid, base, strict=True))
    frequencies = torch.exp(_numbers(width // 4, device) * (-4 * math.log(10000) / width))
    across, down = (
        torch.cat([angle.sin(), angle.cos()], dim=1) for angle in (torch.outer(p, frequencies) for p in (columns, rows))
    )
    found = torch.cat([across.expand(grid[0], -1, -1), down[:, None].expand(-1, grid[1], -1)], dim=2)
    return found.flatten(0, 1)[None].float()


def _numbers(count: int, device: torch.device | None) -> Tensor:
    return torch.arange(count, dtype=torch.float64, device=device)


def interpolated(positions: Tensor, base: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Return learnt positions (1, N, D) of a grid for another grid, by bicubic interpolation."""
    if grid == base:
        return positions
    maps = positions.transpose(1, 2).reshape(1, -1, *base)
    return F.interpolate(maps, size=grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)


def label_rows(cond: Conditioning, rows: int, classes: int, device: torch.device) -> Tensor:
    """Return each row's row in a table of classes + 1 vectors (B,); the last one stands for no label.

    Raises:
        UserError: if labels do not fit, see `check_labels`.
    """
    check_labels(cond, rows, classes)
    if cond.labels is None:
        return torch.full((rows,), classes, device=device)
    return torch.where(cond.labels < 0, classes, cond.labels)


class NoiseAndLabels(nn.Module, ABC):
    """Embeds noise level, class labels and augmentation labels, once they are checked; subclasses define `embed`.

    Args:
        config: of the network.
        waves: number of sines and cosines of the noise.
        shift: of their frequencies, see `blocks.ordered_sinusoids`.
    """

    augment: nn.Linear | None  # of augmentation labels; `embed` adds it by `augmented`

    def __init__(self, config: TransformerConfig, waves: int, shift: float = 0) -> None:
        super().__init__()
        self.classes, self.augment_dim, self.waves, self.shift = config.num_classes, config.augment_dim, waves, shift

    def forward(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """Return what `embed` returns, in the network's dtype, also under autocast.

        Args:
            noise: (B,), the family's c_noise; any float dtype.
            cond: labels (B,) int64 in [-1, num_classes), -1 for no label; augment (B, augment_dim).

        Raises:
            UserError: if labels do not fit the network.
        """
        dtype, rows = next(self.parameters()).dtype, len(noise)
        labels = label_rows(cond, rows, self.classes, noise.device)
        check_augmentation(cond, rows, self.augment_dim)
        with no_autocast(noise.device):
            exact = noise.to(torch.promote_types(dtype, torch.float32))
            waves = ordered_sinusoids(exact, self.waves, shift=self.shift)
            return self.embed(waves.to(dtype), labels, cond.augment)

    @abstractmethod
    def embed(self, waves: Tensor, labels: Tensor, augment: Tensor | None) -> Tensor:
        """Return the embedding.

        Args:
            waves: sines and cosines of the noise (B, waves).
            labels: rows of the class table (B,), see `label_rows`.
            augment: augmentation labels (B, augment_dim), or None.
        """

    def augmented(self, emb: Tensor, augment: Tensor | None) -> Tensor:
        """Add the map of augmentation labels, if there are any, to an embedding (B, E)."""
        if self.augment is None or augment is None:
            return emb
        out: Tensor = emb + self.augment(augment.to(emb.dtype))
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention over all tokens, with scale head_channels^-1/2."""

    def __init__(self, width: int, head_channels: int, *, bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)
        self.norm_q = nn.RMSNorm(head_channels, eps=LEAST_EPS) if qk_norm else None
        self.norm_k = nn.RMSNorm(head_channels, eps=LEAST_EPS) if qk_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to the same shape."""
        q, k, v = self.qkv(x).unflatten(2, (3, -1, self.head_channels)).permute(2, 0, 3, 1, 4)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q).to(v.dtype), self.norm_k(k).to(v.dtype)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class MLP(nn.Module):
    """Two linear layers with a GELU between them; `approximate` as in torch.nn.GELU."""

    def __init__(self, width: int, ratio: float, approximate: str) -> None:
        super().__init__()
        hidden = max(round(width * ratio), 1)
        self.linear0 = nn.Linear(width, hidden)
        self.gelu = nn.GELU(approximate)
        self.linear1 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, N, width) to the same shape."""
        out: Tensor = self.linear1(self.gelu(self.linear0(x)))
        return out


def zero_linear(features_in: int, features_out: int) -> nn.Linear:
    """Return a linear layer of zeros."""
    return linear(features_in, features_out, gain=0.0)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Return x (B, N, D) times 1 + scale plus shift, both (B, D)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def xavier_linears(*modules: nn.Module) -> None:
    """Draw the weights of linear layers as in `blocks.linear`."""
    for layer in (layer for module in modules for layer in module.modules()):
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
