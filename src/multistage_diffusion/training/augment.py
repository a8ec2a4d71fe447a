"""EDM's non-leaky augmentation (Karras et al. 2022, "Elucidating the design space...", Appendix F.2 and Table 6).

Training images are flipped, scaled, rotated, stretched and shifted at random. Nine numbers per image describe the
transformation and are an input of the network. All zeros mean an unchanged image; sampling with zeros yields samples
without the transformations.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng

LABELS = 9  # augmentation labels per row
STRENGTH = 0.2 * math.log(2.0)  # A_scale = A_aniso = 2^0.2
SHIFT = 1 / 8  # A_trans, a fraction of the image size


@dataclass(frozen=True)
class Transformations:
    """Transformations of each image, float64 (B,) each, in the order applied; 0 is the identity.

    Angles are in radians, counter-clockwise in the displayed image.

    Attributes:
        flip_x, flip_y: 1 mirrors left-right, top-bottom.
        scale: magnifies by 2^(0.2 scale) about the centre.
        rotation: angle.
        stretch, direction: magnifies by 2^(0.2 stretch) along the angle `direction`, by the inverse across it.
        shift_x, shift_y: moves right by shift_x / 8 of the width, down by shift_y / 8 of the height.
    """

    flip_x: Tensor
    flip_y: Tensor
    scale: Tensor
    rotation: Tensor
    stretch: Tensor
    direction: Tensor
    shift_x: Tensor
    shift_y: Tensor

    @property
    def labels(self) -> Tensor:
        """Augmentation labels for the network, float32 (B, 9), in the order and form of Table 6."""
        columns = (
            self.flip_x,
            self.flip_y,
            self.scale,
            self.rotation.cos() - 1.0,
            self.rotation.sin(),
            self.stretch * self.direction.cos(),
            self.stretch * self.direction.sin(),
            self.shift_x,
            self.shift_y,
        )
        return torch.stack(columns, dim=1).to(torch.float32)

    @property
    def resampled(self) -> Tensor:
        """Whether a transformation other than a flip is applied, bool (B,)."""
        return torch.stack((self.scale, self.rotation, self.stretch, self.shift_x, self.shift_y)).ne(0).any(0)

    def inverse(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return (a, b, c, d), (B,) each: the matrix ((a, b), (c, d)) from new to old pixel positions.

        Flips and shift are not included. Positions are (right, down) of the centre. In these coordinates
        ((cos, sin), (-sin, cos)) rotates counter-clockwise in the displayed image.
        """
        shrink = torch.exp(-STRENGTH * self.scale)
        cos, sin = shrink * self.rotation.cos(), shrink * self.rotation.sin()
        # the inverse of the stretch: rotate by -direction, scale by (2^(-0.2 stretch), 2^(0.2 stretch)), rotate back
        both, apart = torch.cosh(STRENGTH * self.stretch), -torch.sinh(STRENGTH * self.stretch)
        a, b = both + apart * torch.cos(2 * self.direction), -apart * torch.sin(2 * self.direction)
        d = both - apart * torch.cos(2 * self.direction)
        return cos * a - sin * b, cos * b - sin * d, sin * a + cos * b, sin * b + cos * d


def augment(images: Tensor, p: float, key: rng.Key, rows: Tensor, *, flip: bool = True) -> tuple[Tensor, Tensor]:
    """Transform images at random.

    Args:
        images: float (B, C, H, W) in [-1, 1].
        p: probability of each transformation, in [0, 1], except the left-right flip.
        key: key of the random numbers.
        rows: int64 (B,), global row numbers; the transformation of a row depends only on (key, row).
        flip: mirror left-right with probability 1/2, independent of p; otherwise never.

    Returns:
        The images, with the same dtype and shape, and their labels, float32 (B, 9), see `Transformations.labels`.
        Unchanged and only flipped rows are exact; others may over- and undershoot slightly at sharp edges.
    """
    done = draw(p, key, rows, flip=flip)
    return transform(images, done), done.labels


def draw(p: float, key: rng.Key, rows: Tensor, *, flip: bool = True) -> Transformations:
    """Draw random transformations; for the arguments see `augment`."""
    u = rng.uniform((*key, "uniform"), rows, 9)
    normal = rng.normal((*key, "normal"), rows, (4,), torch.float64)
    on = (u[:, :5] < p).to(torch.float64)
    mirrored = (u[:, 5:7] < 0.5).to(torch.float64)
    angles = (2.0 * u[:, 7:] - 1.0) * math.pi
    return Transformations(
        flip_x=mirrored[:, 0] if flip else torch.zeros_like(mirrored[:, 0]),
        flip_y=on[:, 0] * mirrored[:, 1],
        scale=on[:, 1] * normal[:, 0],
        rotation=on[:, 2] * angles[:, 0],
        stretch=on[:, 3] * normal[:, 1],
        direction=on[:, 3] * angles[:, 1],
        shift_x=on[:, 4] * normal[:, 2],
        shift_y=on[:, 4] * normal[:, 3],
    )


def transform(images: Tensor, done: Transformations) -> Tensor:
    """Transform images (B, C, H, W) with reflection at the borders; no device synchronisation."""
    images = torch.where(_rows(done.flip_x).bool(), images.flip(-1), images)
    images = torch.where(_rows(done.flip_y).bool(), images.flip(-2), images)
    return torch.where(_rows(done.resampled), _warp(images, done), images)


def _rows(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _warp(images: Tensor, done: Transformations) -> Tensor:
    """Resample at twice the resolution: low-pass filter, bilinear interpolation, low-pass filter."""
    height, width = images.shape[2:]
    fine = _double(_double(images).mT).mT
    # source positions of the fine output pixels, in pixels right and down of the centre
    x = _half_steps(width, images) - SHIFT * width * done.shift_x[:, None, None]
    y = _half_steps(height, images)[:, None] - SHIFT * height * done.shift_y[:, None, None]
    a, b, c, d = (entry[:, None, None] for entry in done.inverse())
    centre_x, centre_y = max(width - 1, 1) / 2, max(height - 1, 1) / 2
    grid = torch.stack(((a * x + b * y) / centre_x, (c * x + d * y) / centre_y), dim=-1).to(images.dtype)
    turned = F.grid_sample(fine, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    return _halve(_halve(turned).mT).mT


def _half_steps(size: int, like: Tensor) -> Tensor:
    """Return the positions of the fine pixels relative to the centre, with _REACH more at both ends for `_halve`."""
    return torch.arange(-_REACH, 2 * size - 1 + _REACH, device=like.device, dtype=torch.float64) / 2 - (size - 1) / 2


def _root_raised_cosine(reach: int, rolloff: float) -> list[float]:
    """Return the pulse at -reach/2 .. reach/2 in steps of 1/2; even and odd taps are each scaled to sum 1.

    The pulse is symmetric and nearly orthogonal to its integer shifts. Therefore doubling and then halving (without a
    warp) preserves every frequency within 2 % and a constant exactly.
    """

    def pulse(t: float) -> float:
        if t == 0:
            return 1 + rolloff * (4 / math.pi - 1)
        wave = math.sin(math.pi * t * (1 - rolloff)) + 4 * rolloff * t * math.cos(math.pi * t * (1 + rolloff))
        return wave / (math.pi * t * (1 - (4 * rolloff * t) ** 2))

    taps = [pulse(k / 2) for k in range(-reach, reach + 1)]
    sums = [sum(taps[start::2]) for start in (0, 1)]
    return [tap / sums[i % 2] for i, tap in enumerate(taps)]


_REACH = 6  # half-pixels to each side
_TAPS = _root_raised_cosine(_REACH, 0.65)


def _double(x: Tensor) -> Tensor:
    """Double the resolution along the last axis, (..., W) to (..., 2 W - 1); the end pixels keep their positions."""
    width, margin = x.shape[-1], _REACH // 2
    place = torch.arange(-margin, width + margin, device=x.device).abs() % max(2 * (width - 1), 1)
    padded = x[..., torch.minimum(place, 2 * (width - 1) - place)]  # reflected about the outermost pixels
    on, between = _filtered(padded, _TAPS[0::2], width), _filtered(padded[..., 1:], _TAPS[1::2], width)
    return torch.stack((on, between), dim=-1).flatten(-2)[..., :-1]


def _halve(x: Tensor) -> Tensor:
    """Undo `_double` along the last axis: (..., 2 W - 1 + 2 _REACH) to (..., W)."""
    return 0.5 * _filtered(x, _TAPS, x.shape[-1] - 2 * _REACH, step=2)


def _filtered(x: Tensor, taps: list[float], length: int, step: int = 1) -> Tensor:
    """Return sum_i taps[i] x[..., i : i + length : step].

    A sum of slices is used instead of a convolution: full float32 on every device, and rows do not depend on the batch.
    """
    result = taps[0] * x[..., :length:step]
    for i, tap in enumerate(taps[1:], start=1):
        result = torch.add(result, x[..., i : i + length : step], alpha=tap)
    return result
