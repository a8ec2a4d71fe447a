"""U-ViT (Bao et al. 2023, "All are worth words: a ViT backbone for diffusion models"): tokens and long skips.

The first half of the blocks and the middle one are the encoder that all stages share, the second half a stage's decoder. With
one decoder of the encoder's width and depth this is the published network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config.network import FAMILIES, NetworkConfig
from ..contracts import Conditioning
from ..errors import require
from .layouts import (
    LAYOUTS,
    PublishedLayout,
    Tensors,
    counted_blocks,
    named_back,
    renamed,
    require_published,
    shape_of,
    square_side,
    transformer_settings,
)
from .network import Block
from .transformer import (
    MLP,
    NoiseAndLabels,
    Patches,
    SelfAttention,
    Tokens,
    TransformerConfig,
    interpolated,
    token_norm,
    unpatched,
)

EPS = 1e-5  # of all norms


@FAMILIES.add("uvit")
@dataclass(frozen=True, kw_only=True)
class UViTConfig(TransformerConfig):
    """Settings of a U-ViT; `encoder_depth` counts the blocks with a skip, after which the encoder has a middle block.

    Positions are learnt, those of the tokens of noise and class, too, for inputs of `size`.

    Attributes:
        qkv_bias: whether queries, keys and values have biases.
        time_mlp: map the token of noise by an MLP.
        final_conv: end with a 3x3 convolution of the image.
        init_std: standard deviation of weights and positions at the start: 0.02 as published, for widths of 512 and more;
            about 0.45 / sqrt(width) for others.
    """

    qkv_bias: bool = False
    time_mlp: bool = False
    final_conv: bool = True
    init_std: float = 0.02

    title: ClassVar[str] = "U-ViT"
    in_shapes: ClassVar[tuple[str, ...]] = (
        *TransformerConfig.in_shapes,
        "qkv_bias",
        "time_mlp",
        "final_conv",
        "size",
        "norm",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.init_std <= 1, f"network.init_std={self.init_std} must be in (0, 1]")

    def functional_settings(self) -> dict[str, object]:
        """Return the settings that must be equal for the same weights to compute the same: not how they begin."""
        own = {name: value for name, value in super().functional_settings().items() if name != "network.init_std"}
        own["network.size"] = [self.patch * number for number in self.grid]  # each position is learnt for a place
        return own

    def encoder(self, stage: int, width: int) -> nn.Module:
        """Build the encoder of a stage."""
        return UViTEncoder(self, stage, width)

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        """Build the decoder of a stage."""
        return UViTDecoder(self, stage, encoder_width)


def normal_linear(features_in: int, features_out: int, std: float) -> nn.Linear:
    """Return a linear layer with normal weights and zero biases."""
    layer = nn.Linear(features_in, features_out)
    _initialise(layer, std)
    return layer


def _initialise(module: nn.Module, std: float) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _positions(count: int, width: int, std: float) -> nn.Parameter:
    positions = nn.Parameter(torch.empty(1, count, width))
    nn.init.trunc_normal_(positions, std=std)  # its result is not used: diffusers loads with functions that return none
    return positions


class LabelToken(nn.Module):
    """The token of a class, with its position; a row of its own stands for no label."""

    def __init__(self, classes: int, width: int, std: float) -> None:
        super().__init__()
        self.table = nn.Embedding(classes + 1, width)
        self.position = _positions(1, width, std)

    def forward(self, rows: Tensor) -> Tensor:
        """Map rows of the table (B,) to tokens (B, 1, width)."""
        out: Tensor = self.table(rows)[:, None] + self.position
        return out


class UViTEmbedding(NoiseAndLabels):
    """Tokens of noise level and class, with their positions; augmentation labels are added to that of noise."""

    def __init__(self, config: UViTConfig, width: int) -> None:
        super().__init__(config, width)
        std = config.init_std
        self.position = _positions(1, width, std)
        layers = [normal_linear(width, 4 * width, std), nn.SiLU(), normal_linear(4 * width, width, std)]
        self.mlp = nn.Sequential(*(layers if config.time_mlp else []))
        self.label = LabelToken(config.num_classes, width, std) if config.num_classes else None
        self.augment = nn.Linear(config.augment_dim, width, bias=False) if config.augment_dim else None

    def embed(self, waves: Tensor, labels: Tensor, augment: Tensor | None) -> Tensor:
        """Return tokens (B, 1, width), or (B, 2, width) with classes, the class first."""
        tokens: Tensor = self.augmented(self.mlp(waves), augment)[:, None] + self.position
        return tokens if self.label is None else torch.cat([self.label(labels), tokens], dim=1)


class UViTBlock(Block):
    """Attention and MLP, each after a norm, with residual sums; a decoder's block first takes a skip, by a linear layer.

    `skip` is the width of the skip, None for no skip.
    """

    def __init__(self, config: UViTConfig, width: int, head_channels: int, skip: int | None = None) -> None:
        super().__init__()
        self.skip = nn.Linear(width + skip, width) if skip is not None else None
        self.norm0 = token_norm(config.norm, width, eps=EPS, affine=True)
        self.attention = SelfAttention(width, head_channels, bias=config.qkv_bias, qk_norm=config.qk_norm)
        self.norm1 = token_norm(config.norm, width, eps=EPS, affine=True)
        self.mlp = MLP(width, config.mlp_ratio, approximate="none")
        self.dropout = nn.Dropout(config.dropout)
        _initialise(self, config.init_std)

    def compute(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Map tokens (B, N, D), and those of a skip if the block takes one, to tokens (B, N, D)."""
        if self.skip is not None:
            assert skip is not None
            x = self.skip(torch.cat([x, skip], dim=2))
        x = x + self.dropout(self.attention(self.norm0(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm1(x)))
        return out


class UViTEncoder(nn.Module):
    """Tokens of noise, class and patches, the first half of the blocks, and the middle one."""

    def __init__(self, config: UViTConfig, stage: int, width: int) -> None:
        super().__init__()
        self.base = config.grid
        self.embedding = UViTEmbedding(config, width)
        self.patches = Patches(config.channels, config.patch, width)
        self.positions = _positions(self.base[0] * self.base[1], width, config.init_std)
        head = config.encoder_head(stage)
        self.blocks = nn.ModuleList(UViTBlock(config, width, head) for _ in range(config.encoder_depth))
        self.middle = UViTBlock(config, width, head)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tokens:
        """Encode x (B, C, H, W) at noise = c_noise (B,): the step of a discrete schedule, 999 t or ln(sigma) / 4."""
        grid, told = self.patches.grid(x), self.embedding(noise, cond)
        patches = self.patches(x) + interpolated(self.positions, self.base, grid)
        h, skips = torch.cat([told.to(patches.dtype), patches], dim=1), []
        for block in self.blocks:
            h = block(h)
            skips.append(h)
        return Tokens(h=self.middle(h), skips=tuple(skips), emb=told[:, -1], grid=grid)


class UViTDecoder(nn.Module):
    """A map to the decoder's width if that is another, the second half of the blocks, then norm, linear and 3x3 layers.

    Block j of L takes skip floor(j n / L) of the encoder's n, counted from the deepest: decoders of another depth share
    the skips out evenly.
    """

    def __init__(self, config: UViTConfig, stage: int, encoder_width: int) -> None:
        super().__init__()
        self.patch = config.patch
        width, head, depth = config.decoder_widths[stage], config.decoder_head(stage), config.depth(stage)
        self.taken = tuple(j * config.encoder_depth // depth for j in range(depth))
        std = config.init_std
        self.map = normal_linear(encoder_width, width, std) if width != encoder_width else None
        self.blocks = nn.ModuleList(UViTBlock(config, width, head, skip=encoder_width) for _ in range(depth))
        self.norm = token_norm(config.norm, width, eps=EPS, affine=True)
        self.linear = normal_linear(width, config.channels * config.patch**2, std)
        self.conv = nn.Conv2d(config.channels, config.channels, 3, padding=1) if config.final_conv else None

    def forward(self, encoded: Tokens) -> Tensor:
        """Map the encoder's output for B rows to (B, C, H, W)."""
        h = encoded.h if self.map is None else self.map(encoded.h)
        for block, skip in zip(self.blocks, self.taken, strict=True):
            h = block(h, encoded.skips[-1 - skip])
        grid = encoded.grid
        out = unpatched(self.linear(self.norm(h[:, -grid[0] * grid[1] :])), grid, self.patch)
        return out if self.conv is None else self.conv(out)


@LAYOUTS.add("uvit")
class OriginalUViT(PublishedLayout):
    """The layout of U-ViT's own code: a state dict of the averaged weights (nnet_ema.pth)."""

    family, code, suffix, averaged = "uvit", "U-ViT (.pth)", ".pth", True
    options = frozenset({"head_channels", "encoder_depth", "classes"})
    marks = frozenset({"pos_embed", "mid_block.norm1.weight", "decoder_pred.weight"})
    # noise prediction in the time of VP, told as 999 t
    diffusion: ClassVar[dict[str, Any]] = {"precondition": "vp-eps", "schedule": {"kind": "vp"}}

    @classmethod
    def settings(cls, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings; the last row of the class table stands for no label, unless `classes` says otherwise."""
        width, channels, patch, _ = shape_of(tensors, "patch_embed.proj.weight", 4)
        require(
            (channels, width) != (4, 1152),
            "is U-ViT-H for latents (width 1152): it is told steps 1 to 1000 of Stable Diffusion's betas, not VP's time, and is "
            "not imported",
        )
        depth, rows = counted_blocks(tensors, "in_blocks."), 0
        require(
            told.get("encoder_depth") in (None, depth),
            f"encoder_depth={told.get('encoder_depth')}: a U-ViT is divided at its middle, after {depth} blocks",
        )
        if "label_emb.weight" in tensors:
            rows = shape_of(tensors, "label_emb.weight", 2)[0]
        classes = told.get("classes") or max(rows - 1, 0)
        require(rows > 0 or not classes, f"classes={classes}: has no class table (label_emb.weight); leave it out")
        require(
            told.get("classes") == rows - 1 or rows == 0 or rows % 10 != 0,
            f"label_emb.weight has {rows} rows; give --classes {rows - 1} if the last of them stands for no label (networks "
            "without such a row are not imported)",
        )
        require(
            classes == max(rows - 1, 0), f"classes={classes}: label_emb.weight has {rows} rows, one more than classes"
        )
        patches = shape_of(tensors, "pos_embed", 3)[1] - 1 - (rows > 0)
        side = patch * square_side(patches, "pos_embed")
        names = {"patches": "patch_embed.proj.weight", "hidden": "mid_block.mlp.fc1.weight"}
        depths = (depth, counted_blocks(tensors, "out_blocks."))
        return {
            **transformer_settings(tensors, told, **names, depths=depths),
            "num_classes": classes,
            "size": (side, side),
            "qkv_bias": "mid_block.attn.qkv.bias" in tensors,
            "time_mlp": "time_embed.0.weight" in tensors,
            "final_conv": "final_layer.weight" in tensors,
        }

    @classmethod
    def ours(cls, tensors: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return our state dict."""
        assert isinstance(config, UViTConfig)
        state, positions = renamed(tensors, cls.pairs(config)), tensors["pos_embed"]
        if config.num_classes:
            state["encoders.0.embedding.label.position"], positions = positions[:, :1], positions[:, 1:]
        return state | {"encoders.0.embedding.position": positions[:, :1], "encoders.0.positions": positions[:, 1:]}

    @classmethod
    def theirs(cls, state: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return the published tensors."""
        assert isinstance(config, UViTConfig)
        require_published(config, norm="layer", qk_norm=False, decoder_depths=(config.encoder_depth,))
        require(config.grid[0] == config.grid[1], f"network.size={list(config.size)}: a published U-ViT is square")
        tensors = named_back(state, cls.pairs(config), config.patch)
        names = ["encoders.0.embedding.position", "encoders.0.positions"]
        if config.num_classes:
            names.insert(0, "encoders.0.embedding.label.position")
        return tensors | {"pos_embed": torch.cat([state[name] for name in names], dim=1)}

    @classmethod
    def pairs(cls, config: UViTConfig) -> Iterator[tuple[str, str]]:
        """Yield published and our names of layers."""
        yield "patch_embed.proj", "encoders.0.patches.linear"
        yield "time_embed.0", "encoders.0.embedding.mlp.0"
        yield "time_embed.2", "encoders.0.embedding.mlp.2"
        yield "label_emb", "encoders.0.embedding.label.table"
        blocks = [("mid_block", "encoders.0.middle")]
        blocks += [(f"in_blocks.{i}", f"encoders.0.blocks.{i}") for i in range(config.encoder_depth)]
        blocks += [(f"out_blocks.{i}", f"decoders.0.blocks.{i}") for i in range(config.depth(0))]
        for theirs, ours in blocks:
            for layer, own in (
                ("norm1", "norm0"),
                ("attn.qkv", "attention.qkv"),
                ("attn.proj", "attention.proj"),
                ("norm2", "norm1"),
                ("mlp.fc1", "mlp.linear0"),
                ("mlp.fc2", "mlp.linear1"),
                ("skip_linear", "skip"),
            ):
                yield f"{theirs}.{layer}", f"{ours}.{own}"
        yield "norm", "decoders.0.norm"
        yield "decoder_pred", "decoders.0.linear"
        yield "final_layer", "decoders.0.conv"
