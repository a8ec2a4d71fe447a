"""The objective: sum over stages of lambda_k times the mean loss over the rows of stage k."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import rng
from ..config import RunConfig, TrainingConfig
from ..denoisers import MultiStageDenoiser
from ..shares import row_counts, stage_shares, stage_weights
from .batches import Batch


def row_losses(denoiser: MultiStageDenoiser, batch: Batch) -> Tensor:
    """Return the loss of each row, (B,), float32 (float64 for a float64 network): the mean squared error of F.

    This equals the denoising error weighted by 1/c_out²: the simple loss of eps-prediction, EDM's lambda(sigma), or
    velocity matching.
    """
    # the higher precision of images and network
    batch = batch.to(torch.promote_types(batch.y.dtype, next(denoiser.parameters()).dtype))
    target = denoiser.preconditioning.target(batch.y, batch.noise, batch.sigma)
    output = denoiser.output(batch.noisy, batch.sigma, batch.counts, batch.cond).to(target.dtype)
    return (output - target).square().flatten(1).mean(1)


def stage_losses(denoiser: MultiStageDenoiser, batch: Batch) -> list[Tensor]:
    """Return the sum of the row losses of each stage, scalars of the dtype of `row_losses`."""
    return stage_sums(row_losses(denoiser, batch), batch.counts, (True,) * len(batch.counts))


def stage_sums(rows: Tensor, counts: Sequence[int], counted: Sequence[bool]) -> list[Tensor]:
    """Return the sum of each stage's rows, scalars.

    Args:
        rows: a number of each row, sorted by stage, (B,).
        counts: rows of each stage.
        counted: whether the rows of a stage count; those that do not sum to 0, with a gradient of 0.
    """
    sums = [part.sum() for part in torch.split(rows, list(counts))]
    return [total if own else 0.0 * total for total, own in zip(sums, counted, strict=True)]


def objective(sums: Sequence[Tensor], weights: Sequence[float], counts: Sequence[int]) -> Tensor:
    """Return sum_k weights[k] * sums[k] / counts[k], over the stages with rows.

    Args:
        sums: summed row losses of each stage in this pass, as they are or with learned weights.
        weights: lambda_k.
        counts: rows of each stage in the whole step, so that accumulated micro-batches sum to the same objective.
    """
    return torch.stack([w / c * s for s, w, c in zip(sums, weights, counts, strict=True) if c > 0]).sum()


def updates(
    training: TrainingConfig, step: int, counts: Sequence[int], shares: Sequence[float], weights: Sequence[float]
) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Yield (rows of each stage, objective weights) for every optimiser step of an iteration; see training.update_mode.

    Args:
        training: configuration of the run.
        step: iteration, from 0.
        counts: rows of each stage in a step that trains it.
        shares: share of rows (for "one-stage": of steps) of each stage.
        weights: lambda_k.
    """
    stages = range(len(counts))

    def only(k: int) -> tuple[int, ...]:
        return tuple(counts[k] if j == k else 0 for j in stages)

    if training.update_mode == "mixed":
        yield tuple(counts), tuple(weights)
    elif training.update_mode == "sequential":
        yield from ((only(k), tuple(weights)) for k in stages if counts[k])
    else:
        u = rng.uniform((training.seed, "stage"), torch.tensor([step]), 1).item()
        bounds = torch.tensor(shares, dtype=torch.float64).cumsum(0)
        k = min(int(torch.searchsorted(bounds, u, right=True)), len(bounds) - 1)
        # a stage has probability share, so its weight is weight/share: the expected objective is the same
        yield only(k), tuple(weights[j] / shares[j] if j == k else 0.0 for j in stages)


@dataclass(frozen=True, kw_only=True)
class StageAllocation:
    """What each stage gets in training, one number per stage.

    Attributes:
        training: configuration of the training.
        shares: share of the rows (for "one-stage": of the steps).
        weights: lambda_k of the objective.
        counts: rows in a step that trains the stage.
    """

    training: TrainingConfig
    shares: tuple[float, ...]
    weights: tuple[float, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, config: RunConfig) -> StageAllocation:
        """Return the allocation of a run.

        Raises:
            UserError: if a batch has fewer rows than there are stages with a share.
        """
        training, stages, prior = config.training, config.stages, config.diffusion.prior
        shares = stage_shares(training, stages, prior)
        weights = stage_weights(training, stages, prior)
        return cls(training=training, shares=shares, weights=weights, counts=row_counts(training, shares))

    def updates(self, step: int) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
        """Yield (rows of each stage, objective weights) for every optimiser step of an iteration, see `updates`."""
        yield from updates(self.training, step, self.counts, self.shares, self.weights)
