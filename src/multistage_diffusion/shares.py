"""What each stage gets of the training: shares of rows or steps, rows of a batch, weights of the objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .config import TrainingConfig
from .errors import UserError, require
from .schedules import SigmaPrior
from .stages import Stages


def stage_shares(training: TrainingConfig, stages: Stages, prior: SigmaPrior) -> tuple[float, ...]:
    """Return the share of rows (or of steps) of each stage; the shares sum to 1."""
    if training.shares == "prior":
        return with_floor(prior_masses(stages, prior), training.floor_share)
    raw = (1.0,) * len(stages) if training.shares == "uniform" else training.shares
    return with_floor(tuple(s / sum(raw) for s in raw), training.floor_share)


def with_floor(shares: Sequence[float], floor: float) -> tuple[float, ...]:
    """Raise positive shares below a floor to it; the others are scaled, so that the sum stays 1.

    Raises:
        UserError: if the floor is more than an equal share.
    """
    used = sum(share > 0 for share in shares)
    require(
        floor * used <= 1,
        f"training.floor_share={floor}: {used} stages cannot have so much each; take at most {1 / used:.3g}",
    )
    raised: set[int] = set()
    found = tuple(shares)
    while low := {k for k, share in enumerate(found) if 0 < share < floor and k not in raised}:
        raised |= low
        rest = sum(share for k, share in enumerate(shares) if k not in raised)
        scale = (1 - floor * len(raised)) / rest if rest else 0.0
        found = tuple(floor if k in raised else share * scale for k, share in enumerate(shares))
    return found


def stage_weights(training: TrainingConfig, stages: Stages, prior: SigmaPrior) -> tuple[float, ...]:
    """Return lambda_k of the objective sum_k lambda_k (mean loss of stage k); the lambda_k sum to 1."""
    if training.weights == "prior":
        return prior_masses(stages, prior)
    if training.weights == "shares":
        return stage_shares(training, stages, prior)
    return tuple(w / sum(training.weights) for w in training.weights)


def prior_masses(stages: Stages, prior: SigmaPrior) -> tuple[float, ...]:
    """Return the probability mass of the sigma prior on each stage."""
    return tuple(prior.mass(*stages.interval(k)) for k in range(len(stages)))


def allocate(batch: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Divide a batch among the stages by largest remainder, with at least one row for each stage with a share > 0.

    The counts are the same in every step: shapes stay static, and the objective's weights do not depend on them.

    Raises:
        UserError: if there are fewer rows than stages with a share > 0.
    """
    active = [s > 0 for s in shares]
    if batch < sum(active):
        raise UserError(f"training.batch={batch} is too small for {sum(active)} stages; use at least one row per stage")
    exact = [batch * s for s in shares]
    counts = [max(int(e), int(a)) for e, a in zip(exact, active, strict=True)]
    while sum(counts) != batch:
        step = 1 if sum(counts) < batch else -1
        movable = [k for k in range(len(counts)) if active[k] and (step > 0 or counts[k] > 1)]
        counts[max(movable, key=lambda k: step * (exact[k] - counts[k]))] += step
    return tuple(counts)


def row_counts(training: TrainingConfig, shares: Sequence[float]) -> tuple[int, ...]:
    """Return the rows of each stage in a step that trains it; with "one-stage", the whole batch."""
    if training.update_mode == "one-stage":
        return (training.batch,) * len(shares)
    return allocate(training.batch, shares)


class StageTraining(NamedTuple):
    """What a stage gets of the training, as shares in [0, 1].

    Attributes:
        noise: of the training density's mass.
        rows: of the rows (image, noise) that all stages train on.
        steps: of the steps; with "mixed" and "sequential" updates every step trains every stage that has rows.
    """

    noise: float
    rows: float
    steps: float


def stage_training(training: TrainingConfig, stages: Stages, prior: SigmaPrior) -> list[StageTraining]:
    """Return what each stage gets of the training."""
    shares, noise = stage_shares(training, stages, prior), prior_masses(stages, prior)
    if training.update_mode == "one-stage":
        return [StageTraining(n, share, share) for n, share in zip(noise, shares, strict=True)]
    counts = row_counts(training, shares)
    return [StageTraining(n, c / sum(counts), float(c > 0)) for n, c in zip(noise, counts, strict=True)]
