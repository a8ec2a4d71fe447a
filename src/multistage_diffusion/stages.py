"""Stages: the only code that maps a noise level to a stage."""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import UserError


@dataclass(frozen=True)
class Stages:
    """Half-open intervals [edge_k, edge_k+1) of sigma; stage index 0 ("stage 1" in print) has the lowest noise.

    Attributes:
        interior: the ascending sigma edges between stages; 0 and inf are added. Empty for one stage.
        origin: where the edges come from (data range, time measure, rule, kernel, fingerprint), or empty.

    Raises:
        UserError: if the edges are not finite, positive and strictly ascending.
    """

    interior: tuple[float, ...] = ()
    origin: dict[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "interior", tuple(float(e) for e in self.interior))
        edges = self.edges
        if any(math.isnan(e) for e in edges) or any(a >= b for a, b in itertools.pairwise(edges)):
            raise UserError(
                f"stages: edges {list(self.interior)} must be positive, finite and strictly ascending in sigma"
            )

    @property
    def edges(self) -> tuple[float, ...]:
        """All edges: 0, the interior ones, inf."""
        return (0.0, *self.interior, math.inf)

    def __len__(self) -> int:
        return len(self.interior) + 1

    def interval(self, stage: int) -> tuple[float, float]:
        """Return [low, high) of a stage index."""
        if not 0 <= stage < len(self):
            raise UserError(f"stages: stage index {stage} must be in 0..{len(self) - 1}")
        return self.edges[stage], self.edges[stage + 1]

    def index(self, sigma: Tensor) -> Tensor:
        """Return the stage index of every sample.

        Args:
            sigma: (B,), any float dtype and device; compared in float64.

        Returns:
            int64 (B,), 0 for the lowest noise.

        Raises:
            UserError: if a sigma is NaN or negative.
        """
        if not bool((sigma >= 0).all()):
            raise UserError("stages: sigma must be >= 0 and not NaN")
        edges = torch.tensor(self.interior, dtype=torch.float64, device=sigma.device)
        return torch.bucketize(sigma.to(torch.float64), edges, right=True)

    def index_of(self, sigma: float) -> int:
        """Return the stage index of one sigma."""
        if not sigma >= 0:
            raise UserError(f"stages: sigma={sigma} must be >= 0 and not NaN")
        return bisect.bisect_right(self.interior, sigma)
