"""The optimiser steps of one iteration: which rows each trains, and what they count in the objective."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from .. import rng
from ..config import TrainingConfig


def updates(
    training: TrainingConfig, step: int, counts: Sequence[int], shares: Sequence[float], weights: Sequence[float]
) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Yield (rows of each stage, objective weights) of every optimiser step of an iteration; see training.update_mode.

    Args:
        training: the run's.
        step: of the iteration, from 0.
        counts: rows of each stage in a step that trains it.
        shares: of rows, or, for "one-stage", of steps.
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
        # a stage drawn with probability share counts weight/share, so that the expected objective is the same
        yield only(k), tuple(weights[j] / shares[j] if j == k else 0.0 for j in stages)
