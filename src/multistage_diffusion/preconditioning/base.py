"""The base of all preconditionings."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

from torch import Tensor

from ..config import DiffusionConfig
from ..config.run import PRECONDITIONINGS

LEAST_SIGMA = 1e-12  # keeps a logarithmic time embedding finite at sigma = 0


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each float64 (B,)."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Preconditioning(ABC):
    """The four coefficients as functions of sigma, in float64.

    Subclasses are frozen dataclasses; their fields are what a trained network's output depends on.
    """

    @classmethod
    def of(cls, config: DiffusionConfig) -> Self:
        """Return the preconditioning of a configuration; here it has no settings."""
        return cls()

    @classmethod
    def check(cls, config: DiffusionConfig) -> None:
        """Raise UserError if the preconditioning cannot be used with a configuration's schedule or density."""
        return

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return the coefficients at sigma, float64 (B,)."""

    def target(self, y: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return the target of F for x = y + sigma noise: (y - c_skip x)/c_out, without cancellation.

        Args:
            y: clean data (B, ...).
            noise: standard normal, same shape.
            sigma: float64 (B,), > 0.
        """
        c = self.coefficients(sigma)
        return per_row((1.0 - c.skip) / c.out, y) * y - per_row(c.skip * sigma / c.out, y) * noise


def make_preconditioning(config: DiffusionConfig) -> Preconditioning:
    """Return the preconditioning that a configuration names."""
    kind: type[Preconditioning] = PRECONDITIONINGS[config.precondition]
    return kind.of(config)


def per_row(coefficient: Tensor, like: Tensor) -> Tensor:
    """Cast (B,) to like's dtype and shape it to multiply like's rows."""
    return coefficient.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))
