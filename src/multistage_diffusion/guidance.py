"""Classifier-free guidance (Ho & Salimans 2022, "Classifier-free diffusion guidance")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contracts import Conditioning, Denoiser, denoise_uniform
from .errors import UserError


@dataclass(frozen=True)
class Guided:
    """A Denoiser that goes from a class-conditional one's unlabelled answer towards, and past, its labelled one.

    D = D_none + weight (D_label - D_none): weight 0 is unconditional, 1 conditional (Ho & Salimans write 1 + w for it).
    As the score is (D - x)/sigma², this is the score of p(x)^(1 - weight) p(x | label)^weight at every noise level.
    Weights other than 0 and 1 double the rows of each call: the denoiser is called once, with and without labels.

    Attributes:
        denoiser: a Denoiser that was trained with and without labels (training.label_dropout > 0).
        weight: >= 0.
    """

    denoiser: Denoiser
    weight: float

    def __call__(self, x: Tensor, sigma: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return the guided posterior mean, see contracts.Denoiser.

        Raises:
            UserError: if weight is not 1 and there are no labels.
        """
        return self._guided(x, cond, lambda rows, known: self.denoiser(rows, sigma.repeat(len(rows) // len(x)), known))

    def uniform(self, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        """Return it where all rows have one sigma, see contracts.UniformDenoiser; raises what a call does."""
        return self._guided(x, cond, lambda rows, known: denoise_uniform(self.denoiser, rows, sigma, known))

    def _guided(
        self, x: Tensor, cond: Conditioning | None, denoise: Callable[[Tensor, Conditioning | None], Tensor]
    ) -> Tensor:
        """Combine what `denoise` gives for x, or for x twice, once with labels and once without."""
        if self.weight == 1:
            return denoise(x, cond)
        if cond is None or cond.labels is None:
            raise UserError(
                f"sampling.guidance={self.weight}: there are no class labels to guide by; set it to 1, or use a run with "
                "network.num_classes > 0 and give labels"
            )
        hidden = torch.full_like(cond.labels, -1)
        if self.weight == 0:
            return denoise(x, replace(cond, labels=hidden))
        augment = None if cond.augment is None else cond.augment.repeat(2, 1)
        twice = Conditioning(labels=torch.cat([cond.labels, hidden]), augment=augment)
        labelled, unlabelled = denoise(torch.cat([x, x]), twice).chunk(2)
        return unlabelled + self.weight * (labelled - unlabelled)
