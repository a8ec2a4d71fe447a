"""Denoisers: a multi-decoder network with preconditioning, and a decoder chosen by noise level.

Every parameterisation is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) on unscaled x = y + sigma n (Karras et al.
2022, eq. 7). The loss is the plain squared error of F, i.e. the denoising error weighted by 1/c_out². Depending on the
preconditioning, it is exactly eps-prediction, EDM's loss or velocity matching.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .config import DiffusionConfig, RunConfig
from .contracts import Conditioning, uniform_sigma
from .nets import MultiDecoderNetwork, build_network
from .performance.cpu import quicken
from .performance.execution import Graphs
from .schedules import NoiseSchedule
from .stages import Stages

_LEAST = 1e-12  # keeps the logarithmic time embedding finite at sigma = 0


class Coefficients(NamedTuple):
    """c_skip, c_out, c_in and c_noise, each float64 (B,)."""

    skip: Tensor
    out: Tensor
    input: Tensor
    noise: Tensor


class Preconditioning(ABC):
    """The four coefficients as functions of sigma, in float64."""

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
        return _rows((1.0 - c.skip) / c.out, y) * y - _rows(c.skip * sigma / c.out, y) * noise


@dataclass(frozen=True)
class VPEps(Preconditioning):
    """Noise prediction on the scaled state (Ho et al. 2020; score_sde): D = x - sigma F(s x; c_noise).

    c_noise is 999 t on a continuous schedule and the step itself on a discrete one.
    """

    schedule: NoiseSchedule

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return 1, -sigma, s(sigma) and the embedding's time."""
        time = self.schedule.time(sigma.clamp(min=_LEAST))
        noise = time if self.schedule.kind == "discrete" else 999.0 * time
        return Coefficients(torch.ones_like(sigma), -sigma, self.schedule.scale(sigma), noise)


@dataclass(frozen=True)
class EDMPreconditioning(Preconditioning):
    """EDM (Karras et al. 2022, Table 1); c_noise = ln(sigma)/4."""

    sigma_data: float = 0.5

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return c_skip, c_out, c_in and c_noise of Table 1."""
        data = self.sigma_data
        total = sigma**2 + data**2
        noise = 0.25 * torch.log(sigma.clamp(min=_LEAST))
        return Coefficients(data**2 / total, sigma * data * total.rsqrt(), total.rsqrt(), noise)


@dataclass(frozen=True)
class Velocity(Preconditioning):
    """Rectified flow (Liu et al. 2023): F predicts n - y at x_t = (1-t) y + t n, t = sigma/(1 + sigma).

    c_noise is 999 t.
    """

    def coefficients(self, sigma: Tensor) -> Coefficients:
        """Return 1-t, -t, 1-t and 999 t."""
        keep = 1.0 / (1.0 + sigma)
        return Coefficients(keep, -sigma * keep, keep, 999.0 * sigma * keep)


def make_preconditioning(config: DiffusionConfig) -> Preconditioning:
    """Return the preconditioning that a configuration names."""
    if config.precondition == "edm":
        return EDMPreconditioning(config.sigma_data)
    return Velocity() if config.precondition == "velocity" else VPEps(config.schedule)


class MultiStageDenoiser(nn.Module):
    """A Denoiser: a multi-decoder network, its preconditioning, and the stages that choose each sample's decoder."""

    def __init__(self, network: MultiDecoderNetwork, stages: Stages, preconditioning: Preconditioning) -> None:
        super().__init__()
        self.network = network
        self.graphs: Graphs | None = None  # the network's CUDA graphs, if it is called through them
        self.stages = stages
        self.preconditioning = preconditioning

    def forward(
        self, x: Tensor, sigma: Tensor, cond: Conditioning | None = None, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Return E[y | x], see contracts.Denoiser.

        Args:
            x: unscaled noisy images (B, C, H, W).
            sigma: (B,), any mix of stages.
            cond: labels, or None.
            counts: rows per stage, if the caller has sorted the rows by stage; this avoids a device synchronisation.

        Raises:
            UserError: if a sigma is NaN or negative.
        """
        if counts is not None:
            return self._sorted(x, sigma, counts, cond)
        index = self.stages.index(sigma)
        counts = torch.bincount(index, minlength=len(self.stages)).tolist()
        if max(counts) == len(x):  # one stage only, as in sampling
            return self._sorted(x, sigma, counts, cond)
        order = torch.argsort(index, stable=True)
        rows = self._sorted(x[order], sigma[order], counts, None if cond is None else cond.rows(order))
        return torch.empty_like(rows).index_copy(0, order, rows)

    def uniform(self, x: Tensor, sigma: float, cond: Conditioning | None = None) -> Tensor:
        """Return E[y | x] for one sigma in all rows, without device synchronisation; see contracts.UniformDenoiser.

        Raises:
            UserError: if sigma is NaN or negative.
        """
        stage = self.stages.index_of(sigma)
        counts = [len(x) if k == stage else 0 for k in range(len(self.stages))]
        return self(x, uniform_sigma(x, sigma), cond, counts)  # type: ignore[no-any-return]

    def output(self, x: Tensor, sigma: Tensor, counts: Sequence[int], cond: Conditioning | None = None) -> Tensor:
        """Return the raw network output F(c_in x; c_noise) for rows sorted by stage."""
        c = self.preconditioning.coefficients(sigma.to(torch.float64))
        dtype = next(self.network.parameters()).dtype
        call = self.graphs or self.network
        output: Tensor = call((_rows(c.input, x) * x).to(dtype), c.noise.to(dtype), counts, cond)
        return output

    def _sorted(self, x: Tensor, sigma: Tensor, counts: Sequence[int], cond: Conditioning | None) -> Tensor:
        c = self.preconditioning.coefficients(sigma.to(torch.float64))
        return _rows(c.skip, x) * x + _rows(c.out, x) * self.output(x, sigma, counts, cond).to(x.dtype)


def _rows(coefficient: Tensor, like: Tensor) -> Tensor:
    """Cast (B,) to like's dtype and shape it to multiply like's rows."""
    return coefficient.to(like.dtype).reshape(-1, *([1] * (like.ndim - 1)))


def build_denoiser(config: RunConfig) -> MultiStageDenoiser:
    """Build the freshly initialised denoiser of a run configuration."""
    network = quicken(build_network(config.network))
    return MultiStageDenoiser(network, config.stages, make_preconditioning(config.diffusion))
