"""Classifier-free guidance (Ho & Salimans 2022, "Classifier-free diffusion guidance") and remedies against saturation.

A high weight drives pixels out of range. There are two remedies: guidance in a limited interval of noise levels
(Kynkäänniemi et al. 2024, "Applying guidance in a limited interval improves sample and distribution quality in
diffusion models"), and dynamic thresholding (Saharia et al. 2022, "Photorealistic text-to-image diffusion models with
deep language understanding", section 2.3).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..contracts import Conditioning, Denoiser
from ..errors import UserError


@dataclass(frozen=True)
class Guided:
    """A Denoiser with classifier-free guidance of a class-conditional Denoiser.

    D = D_none + weight (D_label - D_none). Weight 0 is unconditional, 1 is conditional (the weight is 1 + w in Ho &
    Salimans). The score is (D - x)/sigma², so the result is the score of p(x)^(1 - weight) p(x | label)^weight at every
    noise level. Weights other than 0 and 1 double the rows: one call computes them with and without labels.

    Attributes:
        denoiser: a Denoiser that was trained with and without labels (training.label_dropout > 0).
        weight: >= 0.
        interval: (low, high): the weight applies for low < sigma <= high. Elsewhere it is 1; one sigma for all rows does
            not double them there. None: the weight applies everywhere.
    """

    denoiser: Denoiser
    weight: float
    interval: tuple[float, float] | None = None

    def __call__(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return the guided posterior mean, see contracts.Denoiser.

        Raises:
            UserError: if weight is not 1 and there are no labels.
        """
        if self.interval is None or self.weight == 1:
            return self._guided(x, sigma, cond)
        low, high = self.interval
        if not isinstance(sigma, Tensor):
            self._labelled(cond)
            return self._guided(x, sigma, cond) if low < sigma <= high else self.denoiser(x, sigma, cond)
        inside = ((sigma > low) & (sigma <= high)).view(-1, *[1] * (x.ndim - 1))
        return torch.where(inside, self._guided(x, sigma, cond), self.denoiser(x, sigma, cond))

    def _guided(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None) -> Tensor:
        """Return the guided output; weights other than 0 and 1 denoise x twice in one call, with and without labels."""
        if self.weight == 1:
            return self.denoiser(x, sigma, cond)
        known, labels = self._labelled(cond)
        hidden = torch.full_like(labels, -1)
        if self.weight == 0:
            return self.denoiser(x, sigma, replace(known, labels=hidden))
        augment = None if known.augment is None else known.augment.repeat(2, 1)
        twice = Conditioning(labels=torch.cat([labels, hidden]), augment=augment)
        both = sigma.repeat(2) if isinstance(sigma, Tensor) else sigma
        labelled, unlabelled = self.denoiser(torch.cat([x, x]), both, twice).chunk(2)
        return unlabelled + self.weight * (labelled - unlabelled)

    def _labelled(self, cond: Conditioning | None) -> tuple[Conditioning, Tensor]:
        """Return the conditioning and its labels; raise UserError if there are no labels."""
        if cond is None or cond.labels is None:
            raise UserError(
                f"sampling.guidance={self.weight}: there are no class labels to guide by; set it to 1, or use a run with "
                "network.num_classes > 0 and give labels"
            )
        return cond, cond.labels


@dataclass(frozen=True)
class Thresholded:
    """A Denoiser of pixels in [-1, 1] with dynamic thresholding of its output.

    Each row is clipped to [-s, s] and divided by s. s is the quantile of the row's absolute values, at least 1.

    Attributes:
        denoiser: a Denoiser of pixels.
        quantile: in (0, 1]; 0.995 is common. At 1 s is the largest absolute value (at least 1) and nothing is clipped.
    """

    denoiser: Denoiser
    quantile: float

    def __call__(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return the thresholded posterior mean, see contracts.Denoiser."""
        images = self.denoiser(x, sigma, cond)
        rows = images.flatten(1)
        ordered = rows.abs().sort(dim=1).values
        place = self.quantile * (rows.shape[1] - 1)
        low = min(int(place), rows.shape[1] - 1)
        high = min(low + 1, rows.shape[1] - 1)
        limit = torch.lerp(ordered[:, low], ordered[:, high], place - low).clamp(min=1.0)[:, None]
        return (torch.maximum(torch.minimum(rows, limit), -limit) / limit).view_as(images)


@dataclass(frozen=True)
class Clipped:
    """A Denoiser of pixels whose output is clipped to [-bound, bound] (Ho et al. 2020, published code).

    Attributes:
        denoiser: a Denoiser of pixels.
        bound: > 0; 1 for images in [-1, 1].
    """

    denoiser: Denoiser
    bound: float

    def __call__(self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return the clipped posterior mean, see contracts.Denoiser."""
        return self.denoiser(x, sigma, cond).clamp(-self.bound, self.bound)
