"""Building blocks of the NCSN++ and DDPM++ families; the LDM and MEME families reuse some of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contracts import Conditioning
from ..errors import UserError
from .network import Block

GROUPS = 16  # most groups of a GroupNorm, unless a network says otherwise
SQRT_HALF = math.sqrt(0.5)
TINY = 1e-5  # gain of layers that start near zero: the last convolutions and the attention output
ATTENTION_GAIN = math.sqrt(0.2)  # for the fused C -> 3C layer: same bounds as gain sqrt(0.1) on three C -> C layers


class ImageConv(nn.Conv2d):
    """A convolution of the image or its pyramid.

    It sets the memory format of its output. All later layers keep this format.
    """

    memory_format = torch.contiguous_format

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same maps as nn.Conv2d."""
        return super().forward(x).contiguous(memory_format=self.memory_format)


def conv(
    channels_in: int,
    channels_out: int,
    kernel: int = 3,
    gain: float = 1.0,
    *,
    stride: int = 1,
    pad: bool = True,
    kind: type[nn.Conv2d] = nn.Conv2d,
) -> nn.Conv2d:
    """Return a convolution with Xavier-uniform weights times gain and zero biases; `pad` pads by kernel // 2."""
    layer = kind(channels_in, channels_out, kernel, stride, padding=kernel // 2 if pad else 0)
    _initialise(layer.weight, layer.bias, gain)
    return layer


def linear(features_in: int, features_out: int, gain: float = 1.0, *, bias: bool = True) -> nn.Linear:
    """Return a linear layer with Xavier-uniform weights times gain and zero biases."""
    layer = nn.Linear(features_in, features_out, bias)
    _initialise(layer.weight, layer.bias, gain)
    return layer


def _initialise(weight: Tensor, bias: Tensor | None, gain: float) -> None:
    # NCSN++ calls this variance scaling "fan average, uniform" with scale gain^2.
    nn.init.xavier_uniform_(weight, gain)
    if bias is not None:
        nn.init.zeros_(bias)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that keeps the dtype of its input under autocast.

    PyTorch's GroupNorm returns float32 maps for half-precision input. The layers before and after it compute in the
    input's dtype. Means and variances are float32 internally.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, ...) to the same shape."""
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        with no_autocast(x.device):
            return F.group_norm(x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


def group_count(channels: int, most: int = GROUPS) -> int:
    """Return the groups of a GroupNorm of the pixel families: min(channels // 4, most)."""
    return min(channels // 4, most)


def group_norm(channels: int, most: int = GROUPS) -> GroupNorm:
    """Return GroupNorm with min(channels // 4, most) groups and eps 1e-6."""
    return GroupNorm(group_count(channels, most), channels, eps=1e-6)


def sinusoids(noise: Tensor, width: int) -> Tensor:
    """Return [sin, cos](noise * 10000^(-i / (half - 1))), i < half = width / 2: shape (B, width), in noise's dtype."""
    half = width // 2
    i = torch.arange(half, device=noise.device, dtype=noise.dtype)
    angle = noise[:, None] * torch.exp(i * (-math.log(10000) / (half - 1)))
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def ordered_sinusoids(noise: Tensor, width: int, *, cosines_first: bool = True, shift: float = 0) -> Tensor:
    """Return [cos, sin] or [sin, cos] of noise * 10000^(-i / (half - shift)), i < half = width / 2.

    Args:
        noise: (B,).
        width: even.
        cosines_first: the order.
        shift: 0, as in latent diffusion, or 1, as in DDPM.

    Returns:
        (B, width), in noise's dtype.
    """
    half = width // 2
    i = torch.arange(half, device=noise.device, dtype=noise.dtype)
    angle = noise[:, None] * torch.exp(-math.log(10000) * i / (half - shift))  # rounded as in published code
    parts = (angle.cos(), angle.sin())
    return torch.cat(parts if cosines_first else parts[::-1], dim=1)


class NoiseEmbedding(nn.Module):
    """Embeds noise level, class labels and augmentation labels into one vector per row, the input of every block.

    `features` maps noise (B,) and the width to (B, width). Class labels are added to them or, with `late_labels`, to the
    output of the layers.
    """

    def __init__(
        self,
        width: int,
        num_classes: int = 0,
        augment_dim: int = 0,
        features: Callable[[Tensor, int], Tensor] = sinusoids,
        late_labels: bool = False,
    ) -> None:
        super().__init__()
        self.width = width
        self.features = features
        self.late_labels = late_labels
        self.label: nn.Linear | None = None
        if num_classes:
            self.label = linear(num_classes, 4 * width, bias=False) if late_labels else linear(num_classes, width)
        self.augment = linear(augment_dim, width, bias=False) if augment_dim else None
        self.linear0 = linear(width, 4 * width)
        self.linear1 = linear(4 * width, 4 * width)

    def forward(self, noise: Tensor, cond: Conditioning) -> Tensor:
        """Return the embedding (B, 4 width) after the final SiLU, in the network's dtype even under autocast.

        Args:
            noise: (B,), the family's c_noise; any float dtype.
            cond: labels (B,) int64 in [-1, num_classes), -1 for no label; augment (B, augment_dim).

        Raises:
            UserError: if labels are given to a network without this input, have the wrong shape, or class labels are
                out of range. The range is checked on the CPU only; on a GPU the check would cost a synchronisation.
        """
        dtype = self.linear0.weight.dtype
        with no_autocast(noise.device):
            emb = self.features(noise.to(torch.promote_types(dtype, torch.float32)), self.width).to(dtype)
            check_labels(cond, len(noise), self.label.in_features if self.label is not None else 0)
            check_augmentation(cond, len(noise), self.augment.in_features if self.augment is not None else 0)
            if self.label is not None and not self.late_labels:
                emb = emb + self.label(_scaled_one_hot(cond.labels, len(noise), self.label.weight))
            if self.augment is not None and cond.augment is not None:
                emb = emb + self.augment(cond.augment.to(dtype))
            emb = self.linear1(F.silu(self.linear0(emb)))
            if self.label is not None and self.late_labels:
                emb = emb + self.label(_one_hot(cond.labels, len(noise), self.label.weight))
            return F.silu(emb)


def check_labels(cond: Conditioning, rows: int, classes: int) -> None:
    """Raise UserError if class labels do not fit a network of so many classes; see NoiseEmbedding."""
    labels = cond.labels
    if labels is None:
        return
    if not classes:
        raise UserError("cond.labels were given to a network with num_classes=0; leave them out")
    if labels.shape != (rows,):
        raise UserError(f"cond.labels has shape {tuple(labels.shape)}; this batch needs ({rows},)")
    if labels.device.type == "cpu" and bool(((labels < -1) | (labels >= classes)).any()):
        raise UserError(
            f"cond.labels hold {labels.min().item()} to {labels.max().item()}; the network has num_classes={classes}: "
            f"use 0 to {classes - 1}, or -1 for none"
        )


def check_augmentation(cond: Conditioning, rows: int, length: int) -> None:
    """Raise UserError if augmentation labels do not fit a network with labels of this length."""
    if cond.augment is None:
        return
    if not length:
        raise UserError("cond.augment was given to a network with augment_dim=0; leave it out")
    if cond.augment.shape != (rows, length):
        raise UserError(
            f"cond.augment has shape {tuple(cond.augment.shape)}; this batch and network need {(rows, length)}"
        )


def _scaled_one_hot(labels: Tensor | None, rows: int, weight: Tensor) -> Tensor:
    """Return one-hot labels times sqrt(classes); rows are zero for label -1 or if labels is None."""
    return _one_hot(labels, rows, weight) * math.sqrt(weight.shape[1])


def _one_hot(labels: Tensor | None, rows: int, weight: Tensor) -> Tensor:
    """Return one-hot labels (rows, classes) of a layer's dtype; rows are zero for label -1 or if labels is None."""
    classes = weight.shape[1]
    if labels is None:
        return weight.new_zeros(rows, classes)
    hot = labels[:, None] == torch.arange(classes, device=labels.device)
    return hot.to(weight.dtype)


def no_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Return a context that computes in the dtype of the inputs, even inside autocast."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _fir_kernel(channels: int) -> Tensor:
    """Return the outer product of [1, 3, 3, 1] with itself, normalised to sum 1, once per channel: (C, 1, 4, 4)."""
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    return torch.outer(taps, taps).repeat(channels, 1, 1, 1)


class FIRDown(nn.Module):
    """Depthwise [1, 3, 3, 1] filter with sum 1; with the default stride and padding it halves the size."""

    kernel: Tensor

    def __init__(self, channels: int, stride: int = 2, padding: int = 1) -> None:
        super().__init__()
        self.stride, self.padding = stride, padding
        self.register_buffer("kernel", _fir_kernel(channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / 2, W / 2), or to (B, C, H + 1, W + 1) at stride 1 with padding 2."""
        return F.conv2d(x, self.kernel, stride=self.stride, padding=self.padding, groups=len(self.kernel))


class FIRUp(nn.Module):
    """Doubles the size: inserts zeros (factor 2), pads (2, 1), applies a depthwise [1, 3, 3, 1] filter with sum 4."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("kernel", 4 * _fir_kernel(channels), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        return F.conv_transpose2d(x, self.kernel, stride=2, padding=1, groups=len(self.kernel))


class BoxDown(nn.Module):
    """Halves the size by 2x2 averaging."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, H / 2, W / 2)."""
        return F.avg_pool2d(x, 2)


class BoxUp(nn.Module):
    """Doubles the size by nearest-neighbour interpolation."""

    def __init__(self, channels: int) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C, 2H, 2W)."""
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Attention(nn.Module):
    """Self-attention with one head over all pixels, scale C^-1/2, then (x + h) / sqrt(2)."""

    def __init__(self, channels: int, groups: int = GROUPS) -> None:
        super().__init__()
        self.norm = group_norm(channels, groups)
        self.qkv = linear(channels, 3 * channels, ATTENTION_GAIN)
        self.proj = linear(channels, channels, TINY)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).unsqueeze(1).chunk(3, dim=-1)
        h = self.proj(F.scaled_dot_product_attention(q, k, v).squeeze(1))
        out: Tensor = (x + h.transpose(1, 2).view_as(x)).mul_(SQRT_HALF)
        return out


class ResidualBlock(Block):
    """Residual block with two 3x3 convolutions, each after GroupNorm and SiLU, and optional attention at the end.

    The embedding is added between the convolutions. The residual sum is (skip + h) / sqrt(2). `resample` (a module that
    halves or doubles the size) acts on both branches before any convolution. `groups` is the maximum number of groups
    of a GroupNorm.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        emb: int,
        dropout: float,
        *,
        attention: bool = False,
        resample: nn.Module | None = None,
        groups: int = GROUPS,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.resample = resample
        self.norm0 = group_norm(channels_in, groups)
        self.conv0 = conv(channels_in, channels_out)
        self.affine = linear(emb, channels_out)
        self.norm1 = group_norm(channels_out, groups)
        self.conv1 = conv(channels_out, channels_out, gain=TINY)
        project = channels_in != channels_out or resample is not None
        self.skip = conv(channels_in, channels_out, 1) if project else None
        self.attention = Attention(channels_out, groups) if attention else None

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, channels_in, H, W) and the activated embedding (B, emb) to (B, channels_out, H', W')."""
        h = F.silu(self.norm0(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv0(h).add_(self.affine(emb)[:, :, None, None])
        h = self.conv1(self.dropout(F.silu(self.norm1(h))))
        if self.skip is not None:
            x = self.skip(x)
        out: Tensor = h.add_(x).mul_(SQRT_HALF)
        if self.attention is not None:
            out = self.attention(out)
        return out


class Bottom(nn.Module):
    """Two blocks at the lowest resolution; the first one always has attention."""

    def __init__(self, channels: int, emb: int, dropout: float, groups: int = GROUPS) -> None:
        super().__init__()
        self.block0 = ResidualBlock(channels, channels, emb, dropout, attention=True, groups=groups)
        self.block1 = ResidualBlock(channels, channels, emb, dropout, groups=groups)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map (B, C, H, W) to the same shape."""
        h: Tensor = self.block1(self.block0(x, emb), emb)
        return h
