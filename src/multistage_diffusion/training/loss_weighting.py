"""Learned weights of noise levels: loss / exp(u(sigma)) + u(sigma), with u learned beside the network.

For a given loss, the best u is the logarithm of the expected loss at sigma. Every noise level then has about the same
weight in the gradient, whatever the size of its loss (Kendall, Gal and Cipolla 2018, Multi-task learning using
uncertainty to weigh losses; u(sigma) of Karras et al. 2024, Analyzing and improving the training dynamics of diffusion
models). u serves training only: it is in checkpoints, with the optimiser's state, and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from .. import rng
from ..config import RunConfig
from ..distributed import World
from . import checkpoint as ckpt
from .optimizer_state import make_optimizer

_FEATURES = 128  # as Karras et al. 2024
_NAME = "loss_weighting"


class LearnedWeighting(nn.Module):
    """u(sigma), a linear function of random Fourier features of ln(sigma) / 4, zero at first; and its optimiser.

    u has the network's optimiser, but no weight decay, which would draw the weights to 1, and no clipping: its gradient is
    not part of the network's norm, and Adam's steps do not grow with it.

    Args:
        config: of the run.
        device: of the network.

    Attributes:
        weight: coefficients of the features, (128,).
        optimizer: over `weight`; branching replaces the network's optimiser, but not this one.
    """

    names: ClassVar[tuple[str, ...]] = (
        _NAME,
        f"{_NAME}.weight",
    )  # in checkpoints: of what is stored, and of the parameter

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        super().__init__()
        rows, seed = torch.arange(_FEATURES), config.training.seed
        frequencies = rng.normal((seed, "loss weighting", "frequencies"), rows, (), torch.float64)
        phases = rng.uniform((seed, "loss weighting", "phases"), rows, 1)[:, 0]
        self._angles = (2 * math.pi * torch.stack([frequencies, phases])).to(device)
        dtype = torch.float64 if config.training.precision == "fp64" else torch.float32
        self.weight = nn.Parameter(torch.zeros(_FEATURES, device=device, dtype=dtype))
        self.optimizer = make_optimizer(dataclasses.replace(config.optimizer, weight_decay=0.0), self)

    def log_variance(self, sigma: Tensor) -> Tensor:
        """Return u of noise levels (B,), in the dtype of `weight`."""
        frequencies, phases = self._angles
        features = math.sqrt(2) * torch.cos(sigma.log()[:, None] / 4 * frequencies + phases)
        return features.to(self.weight.dtype) @ self.weight

    def forward(self, losses: Tensor, sigma: Tensor) -> Tensor:
        """Return loss / exp(u(sigma)) + u(sigma) of rows (B,)."""
        u = self.log_variance(sigma)
        return losses * torch.exp(-u) + u

    def sum_gradient(self, world: World) -> None:
        """Sum the gradient over all processes; one without rows has none."""
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        world.all_reduce(self.weight.grad)

    def tensors(self) -> dict[str, Tensor]:
        """Return the coefficients and their optimiser's state, for the "optimizer" file of a checkpoint."""
        named = self._named()
        return {**named.state_dict(), **ckpt.optimizer_tensors(self.optimizer, named)}

    def restore(self, path: Path, whole: Collection[str]) -> None:
        """Load what `tensors` returned from the checkpoint in folder `path`.

        Args:
            path: the checkpoint's folder.
            whole: names of all tensors of the network, and `names`.

        Raises:
            UserError: if the file is damaged or has no coefficients, or if a tensor has another shape or dtype or is not
                finite.
        """
        named = self._named()
        ckpt.restore_module(named, path, "optimizer", whole)
        ckpt.restore_moments(self.optimizer, named, path, whole)

    def _named(self) -> nn.Module:
        return nn.ModuleDict({_NAME: self})
