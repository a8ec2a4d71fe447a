"""The protocols that all parts of the library share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor


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
    """The main contract: the expected clean image given a noisy one."""

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return E[y | x] for unscaled x = y + sigma * n, n standard normal.

        Args:
            x: unscaled noisy data (B, C, H, W) (or (B, D)); no factor s(t) applied.
            sigma: noise-to-signal ratio, (B,), finite, >= 0.
            cond: class and augmentation labels, or None.

        Returns:
            The posterior mean, same shape and dtype as x.
        """
        ...


class UniformDenoiser(Denoiser, Protocol):
    """A Denoiser with a method for one sigma in all rows; sigma is a float, which needs no device synchronisation."""

    def uniform(self, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        """Return the result of a call with that sigma in every row, see `Denoiser`."""
        ...


def denoise_uniform(denoiser: Denoiser, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
    """Call a denoiser with one sigma for all rows, in float64, so that a sigma on a stage edge is exact."""
    # look the method up on the class: wrappers such as torch.compile's forward attributes to the inner denoiser
    if hasattr(type(denoiser), "uniform"):
        return cast(UniformDenoiser, denoiser).uniform(x, sigma, cond)
    return denoiser(x, uniform_sigma(x, sigma), cond)


def uniform_sigma(x: Tensor, sigma: float) -> Tensor:
    """Return one sigma for every row of x: float64 (B,), on its device."""
    return torch.full((len(x),), sigma, dtype=torch.float64, device=x.device)


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
