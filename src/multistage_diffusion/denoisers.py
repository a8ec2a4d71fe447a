"""Denoisers: a multi-decoder network with preconditioning, and a decoder chosen by noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import RunConfig
from .contracts import Conditioning, sigma_rows
from .nets import MultiDecoderNetwork, build_network
from .performance.cpu import quicken
from .performance.execution import Graphs
from .preconditioning import Preconditioning, make_preconditioning, per_row
from .stages import Stages


class MultiStageDenoiser(nn.Module):
    """A Denoiser: a multi-decoder network, its preconditioning, and the stages that choose each sample's decoder."""

    def __init__(self, network: MultiDecoderNetwork, stages: Stages, preconditioning: Preconditioning) -> None:
        super().__init__()
        self.network = network
        self.graphs: Graphs | None = None  # the network's CUDA graphs, if it is called through them
        self.stages = stages
        self.preconditioning = preconditioning

    def forward(
        self, x: Tensor, sigma: float | Tensor, cond: Conditioning | None = None, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Return E[y | x], see contracts.Denoiser.

        Args:
            x: unscaled noisy images (B, C, H, W).
            sigma: a float, which is in one stage and needs no device synchronisation, or (B,), any mix of stages.
            cond: labels, or None.
            counts: rows per stage, if the caller has sorted the rows by stage; this avoids a device synchronisation.

        Raises:
            UserError: if a sigma is NaN or negative.
        """
        rows = sigma_rows(x, sigma)
        if counts is None and not isinstance(sigma, Tensor):
            stage = self.stages.index_of(sigma)
            counts = [len(x) if k == stage else 0 for k in range(len(self.stages))]
        if counts is not None:
            return self._sorted(x, rows, counts, cond)
        index = self.stages.index(rows)
        counts = torch.bincount(index, minlength=len(self.stages)).tolist()
        if max(counts) == len(x):  # one stage only
            return self._sorted(x, rows, counts, cond)
        order = torch.argsort(index, stable=True)
        ordered = self._sorted(x[order], rows[order], counts, None if cond is None else cond.rows(order))
        return torch.empty_like(ordered).index_copy(0, order, ordered)

    def output(self, x: Tensor, sigma: Tensor, counts: Sequence[int], cond: Conditioning | None = None) -> Tensor:
        """Return the raw network output F(c_in x; c_noise) for rows sorted by stage."""
        c = self.preconditioning.coefficients(sigma.to(torch.float64))
        dtype = next(self.network.parameters()).dtype
        call = self.graphs or self.network
        output: Tensor = call((per_row(c.input, x) * x).to(dtype), c.noise.to(dtype), counts, cond)
        return output

    def _sorted(self, x: Tensor, sigma: Tensor, counts: Sequence[int], cond: Conditioning | None) -> Tensor:
        c = self.preconditioning.coefficients(sigma.to(torch.float64))
        return per_row(c.skip, x) * x + per_row(c.out, x) * self.output(x, sigma, counts, cond).to(x.dtype)


def build_denoiser(config: RunConfig) -> MultiStageDenoiser:
    """Build the freshly initialised denoiser of a run configuration."""
    network = quicken(build_network(config.network))
    return MultiStageDenoiser(network, config.stages, make_preconditioning(config.diffusion))
