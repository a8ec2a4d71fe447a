"""EDM's non-leaky augmentation (Karras et al. 2022, "Elucidating the design space...", Appendix F.2 and Table 6).

Training images are flipped, scaled, rotated, stretched and shifted at random, and the network is told how by nine
numbers. All zeros mean an untouched image; sampling with zeros leaves no trace of the transformations in its samples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import rng

LABELS = 9  # numbers per row that tell the network what was done
STRENGTH = 0.2 * math.log(2.0)  # A_scale = A_aniso = 2^0.2
SHIFT = 1 / 8  # A_trans, a share of the image's size


@dataclass(frozen=True)
class Transformations:
    """What is done to each image, float64 (B,) each, in the order applied; 0 leaves it. Angles: counter-clockwise as seen.

    Attributes:
        flip_x, flip_y: 1 mirrors left-right, top-bottom.
        scale: magnifies by 2^(0.2 scale) about the centre.
        rotation: angle.
        stretch, direction: magnifies by 2^(0.2 stretch) along the angle `direction` and by its inverse across.
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
        """What the network is told, float32 (B, 9), in the order and form of Table 6."""
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
        """Whether anything but flips is done, bool (B,)."""
        return torch.stack((self.scale, self.rotation, self.stretch, self.shift_x, self.shift_y)).ne(0).any(0)

    def inverse(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the matrix ((a, b), (c, d)), (B,) each, from a pixel's new place to its old one, without flips and shift.

        Places are (right, down) of the centre: there ((cos, sin), (-sin, cos)) turns counter-clockwise as seen.
        """
        shrink = torch.exp(-STRENGTH * self.scale)
        cos, sin = shrink * self.rotation.cos(), shrink * self.rotation.sin()
        # the inverse of the stretch: turn by -direction, magnify by (2^(-0.2 stretch), 2^(0.2 stretch)), turn back
        both, apart = torch.cosh(STRENGTH * self.stretch), -torch.sinh(STRENGTH * self.stretch)
        a, b = both + apart * torch.cos(2 * self.direction), -apart * torch.sin(2 * self.direction)
        d = both - apart * torch.cos(2 * self.direction)
        return cos * a - sin * b, cos * b - sin * d, sin * a + cos * b, sin * b + cos * d


def augment(images: Tensor, p: float, key: rng.Key, rows: Tensor, *, flip: bool = True) -> tuple[Tensor, Tensor]:
    """Transform images at random.

    Args:
        images: float (B, C, H, W) in [-1, 1].
        p: probability of each transformation, in [0, 1], but for the left-right flip.
        key: what the random numbers are for.
        rows: int64 (B,), global row numbers: what is done to a row depends on (key, row) alone.
        flip: mirror left-right with probability 1/2, whatever p; otherwise never.

    Returns:
        The images, in the same type and shape, untouched rows and flips bit for bit, others slightly over- and undershooting
        at sharp edges; and what was done to them, float32 (B, 9), see `Transformations.labels`.
    """
    done = draw(p, key, rows, flip=flip)
    return transform(images, done), done.labels


def draw(p: float, key: rng.Key, rows: Tensor, *, flip: bool = True) -> Transformations:
    """Draw transformations; arguments as of `augment`."""
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
    """Transform images (B, C, H, W); beyond their borders they go on mirrored. Nothing waits for the device."""
    images = torch.where(_rows(done.flip_x).bool(), images.flip(-1), images)
    images = torch.where(_rows(done.flip_y).bool(), images.flip(-2), images)
    return torch.where(_rows(done.resampled), _warp(images, done), images)


def _rows(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _warp(images: Tensor, done: Transformations) -> Tensor:
    """Resample at twice the resolution: a low-pass filter before and after, bilinear interpolation between."""
    height, width = images.shape[2:]
    fine = _double(_double(images).mT).mT
    # where the finer result's pixels come from, in pixels right and down of the centre
    x = _half_steps(width, images) - SHIFT * width * done.shift_x[:, None, None]
    y = _half_steps(height, images)[:, None] - SHIFT * height * done.shift_y[:, None, None]
    a, b, c, d = (entry[:, None, None] for entry in done.inverse())
    centre_x, centre_y = max(width - 1, 1) / 2, max(height - 1, 1) / 2
    grid = torch.stack(((a * x + b * y) / centre_x, (c * x + d * y) / centre_y), dim=-1).to(images.dtype)
    turned = F.grid_sample(fine, grid, mode="bilinear", padding_mode="reflection", align_corners=True)
    return _halve(_halve(turned).mT).mT


def _half_steps(size: int, like: Tensor) -> Tensor:
    """Return the places of the finer pixels from the centre, and of _REACH more at both ends, for `_halve`."""
    return torch.arange(-_REACH, 2 * size - 1 + _REACH, device=like.device, dtype=torch.float64) / 2 - (size - 1) / 2


def _root_raised_cosine(reach: int, rolloff: float) -> list[float]:
    """Return the pulse at -reach/2 .. reach/2 in steps of 1/2, each of the two interleaved combs scaled to sum 1.

    It is symmetric and nearly orthogonal to itself at whole distances, so that doubling and halving without a warp
    between return every frequency within 2 %; a constant returns exactly.
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
    """Double the resolution along the last axis: (..., W) to (..., 2 W - 1), the first and last pixels where they were."""
    width, margin = x.shape[-1], _REACH // 2
    place = torch.arange(-margin, width + margin, device=x.device).abs() % max(2 * (width - 1), 1)
    padded = x[..., torch.minimum(place, 2 * (width - 1) - place)]  # mirrored about the outermost pixels
    on, between = _filtered(padded, _TAPS[0::2], width), _filtered(padded[..., 1:], _TAPS[1::2], width)
    return torch.stack((on, between), dim=-1).flatten(-2)[..., :-1]


def _halve(x: Tensor) -> Tensor:
    """Undo `_double` along the last axis: (..., 2 W - 1 + 2 _REACH) to (..., W)."""
    return 0.5 * _filtered(x, _TAPS, x.shape[-1] - 2 * _REACH, step=2)


def _filtered(x: Tensor, taps: list[float], length: int, step: int = 1) -> Tensor:
    """Return sum_i taps[i] x[..., i : i + length : step].

    As a sum of slices, not a convolution: full float32 on every device, and no row depends on its batch.
    """
    result = taps[0] * x[..., :length:step]
    for i, tap in enumerate(taps[1:], start=1):
        result = torch.add(result, x[..., i : i + length : step], alpha=tap)
    return result
