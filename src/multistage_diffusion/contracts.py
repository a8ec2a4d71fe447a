"""The protocols that all parts of the library share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """Inputs of a denoiser besides the noisy image and sigma.

    Attributes:
        labels: class labels, int64 (B,), -1 for "no label"; None for an unconditional call.
        augment: augmentation labels, float (B, A) (EDM's non-leaky augmentation); None for zeros.
    """

    labels: Tensor | None = None
    augment: Tensor | None = None

    def rows(self, index: Tensor | slice) -> Conditioning:
        """Return the conditioning of a selection of rows."""
        return Conditioning(
            labels=None if self.labels is None else self.labels[index],
            augment=None if self.augment is None else self.augment[index],
        )


@runtime_checkable
class Denoiser(Protocol):
    """The main contract: the expected clean image given a noisy one.

    Samplers pass sigma as a float: one noise level for all rows, in float64, without a device synchronisation. Metrics
    such as the likelihood pass one sigma per row. A denoiser of your own that is only sampled needs to take the float
    alone; `sigma_rows` turns both into one sigma per row.
    """

    def __call__(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return E[y | x] for unscaled x = y + sigma * n, n standard normal.

        Args:
            x: unscaled noisy data (B, C, H, W) (or (B, D)); no factor s(t) applied.
            sigma: noise-to-signal ratio, finite, >= 0: a float for all rows, or (B,).
            cond: class and augmentation labels, or None.

        Returns:
            The posterior mean, same shape and dtype as x.
        """
        ...


def sigma_rows(x: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the sigma of every row of x: float64 (B,), on its device; no device synchronisation for a float.

    Raises:
        UserError: if sigma is a tensor of another shape than (B,).
    """
    if not isinstance(sigma, Tensor):
        return torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)
    if sigma.shape != (len(x),):
        raise UserError(f"denoiser: sigma.shape={tuple(sigma.shape)} must be ({len(x)},), one per row of x")
    return sigma.to(device=x.device, dtype=torch.float64)


@runtime_checkable
class Codec(Protocol):
    """Maps images to smaller latents and back, deterministically and without gradients.

    Latents are unscaled: the network's input is a latent times the run's scale.
    """

    fingerprint: str

    def encode(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) in [-1, 1] to latents, float32 (B, c, h, w)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Map latents (B, c, h, w) to images, float32 (B, C, H, W), about in [-1, 1] (not clamped)."""
        ...

    def latent_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """Return (c, h, w) for images of shape (C, H, W); ValueError if they cannot be encoded."""
        ...


def as_float64(value: float | Tensor, device: torch.device | str | None = None) -> Tensor:
    """Return value as a float64 tensor (noise arithmetic is done in float64 throughout)."""
    if isinstance(value, Tensor):
        return value.to(device=device, dtype=torch.float64)
    return torch.tensor(value, dtype=torch.float64, device=device)
