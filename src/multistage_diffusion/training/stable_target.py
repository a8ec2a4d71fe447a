"""Training targets of lower variance: means over reference images (Xu et al. 2023, Stable target field).

A row's target is its own clean image y, one draw from the posterior of the image given x = y + sigma n. Its mean over many
images is the same in expectation but for a bias that falls with their number, and scatters less.
"""

from __future__ import annotations

import torch
from torch import Tensor


def averaged(y: Tensor, noise: Tensor, sigma: Tensor, references: Tensor, used: Tensor) -> tuple[Tensor, Tensor]:
    """Return the posterior mean of the image over a row's own and the references, and the noise with which x is the same.

    Args:
        y: clean images of the rows, (B, ...).
        noise: their standard normal noise, same shape.
        sigma: (B,), > 0.
        references: images (R, ...).
        used: bool (B, R), whether an image is a reference of a row.

    Returns:
        (mean, noise) with mean + sigma noise = y + sigma noise of the arguments, of y's shape and dtype.
    """
    own, n, others = (part.flatten(1).double() for part in (y, noise, references))
    level = sigma.double()[:, None]
    # |x - r|² - |x - y|² = |y - r|² + 2 sigma n (y - r), without the noise's own square, which would cancel
    square = own.square().sum(1)[:, None] + others.square().sum(1) - 2 * own @ others.T
    cross = (n * own).sum(1)[:, None] - n @ others.T
    scores = (-(square / (2 * level.square()) + cross / level)).masked_fill(~used, -torch.inf)
    weights = torch.cat([torch.zeros_like(level), scores], 1).softmax(1)
    # differences from the own image, so that it is kept to the bit where no other has weight
    shift = (weights[:, 1:] @ others - weights[:, 1:].sum(1, keepdim=True) * own).reshape(y.shape)
    per_row = level.reshape(-1, *[1] * (y.ndim - 1))
    return (y + shift).to(y.dtype), (noise - shift / per_row).to(noise.dtype)
