"""DiT (Peebles and Xie 2023, "Scalable diffusion models with transformers"): blocks with adaLN-Zero.

The first blocks are the encoder that all stages share, the others a stage's decoder. With one decoder of the encoder's width
this is the published network, whose blocks are those of both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config.network import FAMILIES, NetworkConfig
from ..contracts import Conditioning
from ..errors import require
from .blocks import linear
from .layouts import (
    LAYOUTS,
    PublishedLayout,
    Tensors,
    chunks,
    counted_blocks,
    named_back,
    positive_number,
    renamed,
    require_published,
    shape_of,
    square_side,
    transformer_settings,
)
from .network import Block
from .transformer import (
    LEAST_EPS,
    MLP,
    NoiseAndLabels,
    Patches,
    SelfAttention,
    Tokens,
    TransformerConfig,
    modulated,
    sincos_positions,
    token_norm,
    unpatched,
    xavier_linears,
    zero_linear,
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


class DiTEmbedding(NoiseAndLabels):
    """Embeds noise level, class labels and augmentation labels into one vector per row (B, width)."""

    def __init__(self, config: DiTConfig, width: int) -> None:
        super().__init__(config, FREQUENCIES, config.freq_shift)
        self.linear0, self.linear1 = linear(FREQUENCIES, width), linear(width, width)
        self.label = nn.Embedding(config.num_classes + 1, width) if config.num_classes else None
        self.augment = linear(config.augment_dim, width, bias=False) if config.augment_dim else None
        tables = [] if self.label is None else [self.label.weight]
        for weight in (self.linear0.weight, self.linear1.weight, *tables):
            nn.init.normal_(weight, std=0.02)

    def embed(self, waves: Tensor, labels: Tensor, augment: Tensor | None) -> Tensor:
        """Return the embedding after a SiLU, with which all blocks begin."""
        emb = self.linear1(F.silu(self.linear0(waves)))
        if self.label is not None:
            emb = emb + self.label(labels)
        return F.silu(self.augmented(emb, augment))


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
        xavier_linears(self.attention, self.mlp)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map tokens (B, N, D) and the activated embedding (B, E) to tokens (B, N, D)."""
        shift0, scale0, gate0, shift1, scale1, gate1 = self.modulation(emb).chunk(6, dim=1)
        h = self.attention(modulated(self.norm0(x), shift0, scale0))
        x = x + gate0[:, None] * self.dropout(h)
        h = self.mlp(modulated(self.norm1(x), shift1, scale1))
        out: Tensor = x + gate1[:, None] * self.dropout(h)
        return out


class DiTEncoder(nn.Module):
    """Embedding, patches with positions, and the first blocks."""

    positions: Tensor

    def __init__(self, config: DiTConfig, stage: int, width: int) -> None:
        super().__init__()
        self.base = config.grid
        self.embedding = DiTEmbedding(config, width)
        self.patches = Patches(config.channels, config.patch, width)
        self.register_buffer("positions", sincos_positions(width, self.base, self.base), persistent=False)
        head = config.encoder_head(stage)
        self.blocks = nn.ModuleList(DiTBlock(config, width, width, head) for _ in range(config.encoder_depth))
        xavier_linears(self.patches)

    def forward(self, x: Tensor, noise: Tensor, cond: Conditioning) -> Tokens:
        """Encode x (B, C, H, W) at noise = c_noise (B,): the step of a discrete schedule, 999 t or ln(sigma) / 4."""
        grid, emb = self.patches.grid(x), self.embedding(noise, cond)
        positions = self.positions
        if grid != self.base:
            positions = sincos_positions(positions.shape[2], grid, self.base, positions.device).to(positions.dtype)
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


# --- published layouts


class _DiTLayout(PublishedLayout):
    """What both layouts share: the network is derived from shapes, and its blocks are divided into encoder and decoder."""

    family = "dit"
    # DDPM's steps, told as they are
    diffusion: ClassVar[dict[str, Any]] = {
        "precondition": "vp-eps",
        "schedule": {"kind": "discrete", "beta_start": 1e-4, "beta_end": 0.02, "steps": 1000, "spacing": "linear"},
    }
    # names of the patches' layer, the last layer, the blocks, the first layer of an MLP, and the class table
    first: ClassVar[str]
    last: ClassVar[str]
    blocks: ClassVar[str]
    hidden: ClassVar[str]
    table: ClassVar[str]
    outer: ClassVar[dict[str, str]]  # published and our names of other layers, and of those in a block
    inner: ClassVar[dict[str, str]]

    @classmethod
    def settings(cls, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings; outputs for a learnt variance are kept unless drop_sigma is told."""
        _, channels, patch, _ = shape_of(tensors, f"{cls.first}.weight", 4)
        outputs, depth = shape_of(tensors, f"{cls.last}.weight", 2)[0], counted_blocks(tensors, cls.blocks)
        shared = int(told.get("encoder_depth", depth // 2))
        require(0 < shared < depth, f"encoder_depth={shared} of {depth} blocks must leave some to encoder and decoder")
        require(
            outputs in (channels * patch**2, 2 * channels * patch**2),
            f"{cls.last}.weight has {outputs} outputs, not {channels} or {2 * channels} for each pixel of a patch",
        )
        depths = (shared, depth - shared)
        return {
            **transformer_settings(tensors, told, patches=f"{cls.first}.weight", hidden=cls.hidden, depths=depths),
            "num_classes": shape_of(tensors, cls.table, 2)[0] - 1,
            "learned_sigma": outputs > channels * patch**2 and not told.get("drop_sigma"),
        }

    @classmethod
    def ours(cls, tensors: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return our state dict, without the outputs for a learnt variance if the network has none."""
        assert isinstance(config, DiTConfig)
        state = renamed(tensors, cls.pairs(config)) | {"encoders.0.embedding.label.weight": tensors[cls.table]}
        for kind in ("weight", "bias"):
            name = f"decoders.0.linear.{kind}"
            parts = state[name].unflatten(0, (config.patch**2, -1))  # type: ignore[no-untyped-call]
            kept = config.channels * (1 + config.learned_sigma)
            state[name] = parts[:, :kept].flatten(0, 1)
        return state

    @classmethod
    def theirs(cls, state: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return the published tensors, but for attention."""
        assert isinstance(config, DiTConfig)
        require_published(config, norm="layer", qk_norm=False)
        require(
            config.num_classes > 0, "network.num_classes=0: a published DiT has classes; this run cannot be exported"
        )
        tensors = named_back(state, cls.pairs(config), config.patch)
        return tensors | {cls.table: state["encoders.0.embedding.label.weight"]}

    @classmethod
    def pairs(cls, config: DiTConfig) -> Iterator[tuple[str, str]]:
        """Yield published and our names of layers."""
        yield from {cls.first: "encoders.0.patches.linear", cls.last: "decoders.0.linear", **cls.outer}.items()
        for i, ours in _blocks(config):
            for theirs, own in cls.inner.items():
                yield f"{cls.blocks}{i}.{theirs}", f"{ours}.{own}"


def _blocks(config: DiTConfig) -> Iterator[tuple[int, str]]:
    """Yield the number of each block of the published network, and our name."""
    for i in range(config.encoder_depth):
        yield i, f"encoders.0.blocks.{i}"
    for i in range(config.depth(0)):
        yield config.encoder_depth + i, f"decoders.0.blocks.{i}"


@LAYOUTS.add("dit")
class OriginalDiT(_DiTLayout):
    """The layout of DiT's own code: a state dict, or a checkpoint of its training with `model` and `ema`."""

    code, suffix = "DiT (.pt)", ".pt"
    options = frozenset({"head_channels", "encoder_depth", "drop_sigma", "noise"})
    first, last, blocks, hidden = "x_embedder.proj", "final_layer.linear", "blocks.", "blocks.0.mlp.fc1.weight"
    table = "y_embedder.embedding_table.weight"
    outer: ClassVar[dict[str, str]] = {
        "t_embedder.mlp.0": "encoders.0.embedding.linear0",
        "t_embedder.mlp.2": "encoders.0.embedding.linear1",
        "final_layer.adaLN_modulation.1": "decoders.0.modulation",
    }
    inner: ClassVar[dict[str, str]] = {
        "attn.qkv": "attention.qkv",
        "attn.proj": "attention.proj",
        "mlp.fc1": "mlp.linear0",
        "mlp.fc2": "mlp.linear1",
        "adaLN_modulation.1": "modulation",
    }
    marks = frozenset({f"{first}.weight", table})

    @classmethod
    def settings(cls, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings, with the size from the number of positions."""
        found = super().settings(tensors, told)
        grid = square_side(shape_of(tensors, "pos_embed", 3)[1], "pos_embed")
        side, fixed = found["patch"] * grid, sincos_positions(found["encoder_width"], (grid, grid), (grid, grid))
        require(
            tensors["pos_embed"].is_meta or torch.allclose(tensors["pos_embed"].float(), fixed, atol=1e-2),
            "pos_embed holds other positions than the sines and cosines of a published DiT",
        )
        return {**found, "size": (side, side)}

    @classmethod
    def theirs(cls, state: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return the published tensors, positions included."""
        assert isinstance(config, DiTConfig)
        require_published(config, freq_shift=0.0, norm_eps=LEAST_EPS)
        require(len({*config.grid}) == 1, f"network.size={list(config.size)}: a published DiT is square")
        return super().theirs(state, config) | {
            "pos_embed": sincos_positions(config.encoder_width, config.grid, config.grid)
        }


@LAYOUTS.add("dit-diffusers")
class DiffusersDiT(_DiTLayout):
    """The layout of diffusers' DiTTransformer2DModel, in which every block has a copy of the embedding."""

    code, class_name = "diffusers' DiT (a folder)", "DiTTransformer2DModel"
    options = frozenset({"encoder_depth", "drop_sigma"})
    first, last, blocks = "pos_embed.proj", "proj_out_2", "transformer_blocks."
    hidden = "transformer_blocks.0.ff.net.0.proj.weight"
    embedding = "transformer_blocks.0.norm1.emb"
    table = f"{embedding}.class_embedder.embedding_table.weight"
    outer: ClassVar[dict[str, str]] = {
        f"{embedding}.timestep_embedder.linear_1": "encoders.0.embedding.linear0",
        f"{embedding}.timestep_embedder.linear_2": "encoders.0.embedding.linear1",
        "proj_out_1": "decoders.0.modulation",
    }
    inner: ClassVar[dict[str, str]] = {  # and queries, keys and values, which are one layer here
        "attn1.to_out.0": "attention.proj",
        "ff.net.0.proj": "mlp.linear0",
        "ff.net.2": "mlp.linear1",
        "norm1.linear": "modulation",
    }
    marks = frozenset({f"{first}.weight", table})

    @classmethod
    def reads(cls, told: Mapping[str, Any]) -> bool:
        """Return whether a config.json is DiT's, also under the class's former name, as in facebook/DiT-XL-2-256."""
        former = told.get("_class_name") == "Transformer2DModel" and told.get("norm_type") == "ada_norm_zero"
        return former or super().reads(told)

    @classmethod
    def settings(cls, tensors: Mapping[str, Tensor], told: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings: heads, size and eps of config.json, and diffusers' frequencies."""
        for name, value in (("norm_type", "ada_norm_zero"), ("activation_fn", "gelu-approximate")):
            require(told.get(name, value) == value, f"config.json: {name}={told.get(name)!r} is not DiT's {value!r}")
        side = positive_number(told.get("sample_size"), "sample_size")
        head = positive_number(told.get("attention_head_dim"), "attention_head_dim")
        eps = told.get("norm_eps", 1e-5)
        require(type(eps) in (int, float), f"config.json: norm_eps={eps!r} must be a number")
        across = shape_of(tensors, f"{cls.first}.weight", 4)[0]
        require(
            across % head == 0,
            f"config.json: attention_head_dim={head} does not divide the width {across} of the weights",
        )
        found = super().settings(tensors, {**told, "head_channels": head})
        patch, width = found["patch"], found["encoder_width"]
        for name, value in (
            ("patch_size", patch),
            ("in_channels", found["channels"]),
            ("num_attention_heads", width // head),
            ("num_layers", found["encoder_depth"] + found["decoder_depths"][0]),
            ("num_embeds_ada_norm", found["num_classes"]),
        ):
            require(
                told.get(name, value) == value, f"config.json: {name}={told.get(name)!r}, but the weights have {value}"
            )
        side -= side % patch  # as diffusers counts patches
        return {**found, "size": (side, side), "freq_shift": 1.0, "norm_eps": float(eps)}

    @classmethod
    def ours(cls, tensors: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return our state dict, with the embedding of the first block."""
        assert isinstance(config, DiTConfig)
        state = super().ours(tensors, config)
        for i, ours in _blocks(config):
            theirs = f"transformer_blocks.{i}"
            for kind in ("weight", "bias"):
                parts = [tensors[f"{theirs}.attn1.to_{part}.{kind}"] for part in "qkv"]
                state[f"{ours}.attention.qkv.{kind}"] = torch.cat(parts)
            for name in cls._embedding():
                own = name.replace(".0.", f".{i}.", 1)
                message = f"{own} is not that of block 0: a DiT has one embedding for all blocks"
                require(torch.equal(tensors[own], tensors[name]), message)
        return state

    @classmethod
    def _embedding(cls) -> Iterator[str]:
        layers = (f"{cls.embedding}.timestep_embedder.linear_{number}" for number in (1, 2))
        yield from (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))
        yield cls.table

    @classmethod
    def theirs(cls, state: Mapping[str, Tensor], config: NetworkConfig) -> Tensors:
        """Return the published tensors, with copies of the embedding."""
        assert isinstance(config, DiTConfig)
        tensors = super().theirs(state, config)
        for i, ours in _blocks(config):
            theirs = f"transformer_blocks.{i}"
            for kind in ("weight", "bias"):
                names = [f"{theirs}.attn1.to_{part}.{kind}" for part in "qkv"]
                tensors |= chunks(state[f"{ours}.attention.qkv.{kind}"], names)
            tensors |= {name.replace(".0.", f".{i}.", 1): tensors[name] for name in cls._embedding()}
        return tensors
