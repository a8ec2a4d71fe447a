"""How alike the gradients of a run's loss are at different noise levels: the affinity of gradient clustering.

The baseline of the paper's Table 4 (B.7), after Go et al. 2023, "Addressing negative transfer in diffusion models": noise
levels whose gradients point the same way belong to one stage.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import rng
from ..contracts import Conditioning
from ..denoisers import MultiStageDenoiser
from ..errors import UserError
from ..schedules import VP, NoiseSchedule
from .batches import Batch
from .checkpoint import checkpoint_step, list_checkpoints
from .losses import stage_losses
from .run import Run

Progress = Callable[[int, int], None]  # (gradients done, gradients in all)

_NUMBERS = 1 << 22  # of a gradient that are summed in float64 at once


class Affinity(NamedTuple):
    """Cosines between the gradients of M bins of time.

    Attributes:
        borders: of the bins, ascending, M + 1 times.
        matrix: cosines in [-1, 1], float64 (M, M), on the CPU; symmetric, ones on the diagonal.
        steps: of the checkpoints over which they are averaged.
    """

    borders: tuple[float, ...]
    matrix: Tensor
    steps: tuple[int, ...]


def gradient_affinity(
    run: Run,
    y: Tensor,
    labels: Tensor | None = None,
    *,
    measure: VP,
    bins: int = 40,
    batch: int = 64,
    memory: int = 2 << 30,
    seed: int = 0,
    progress: Progress | None = None,
) -> Affinity:
    """Compare a run's gradients at different noise levels, averaged over all its kept checkpoints.

    A bin's gradient is that of the mean loss (the squared error of F, see `stage_losses`) over R rows whose times are
    uniform in the bin: the same images and unit noise for every bin, the weights in training (not the averaged ones), no
    dropout, no autocast. It is taken over the parameters that all noise levels share (`shared_parameters`). A run of
    several stages also shows its own edges, where its decoders change; the paper takes a run of one stage, and its
    checkpoints of every 50,000 steps (training.keep_every) up to 450,000.

    Cost: M gradients of R rows for each checkpoint where M of them, of P parameters, fit into `memory` (4 M P bytes);
    where only b do, the others are made again for every b: about M (M / b + 1) / 2 in all.

    Args:
        run: its kept checkpoints are used.
        y: clean images in [-1, 1], or latents as the network sees them, float32 (R, C, H, W), where to compute.
        labels: their classes, int64 (R,); None for a run without classes.
        measure: the kernel of the times; the bins divide evenly what its domain has in common with the run's schedule.
        bins: M.
        batch: rows computed at once.
        memory: bytes of gradients to keep, roughly; one is kept in any case.
        seed: decides the noise.
        progress: called with (gradients done, gradients in all).

    Raises:
        UserError: if the run has no checkpoint, or several stages that share nothing; if there is no bin, or no time
            in common; or if a gradient is zero or not finite.
    """
    if bins < 1:
        raise UserError(f"bins={bins} must be at least 1")
    run.checkpoint("latest")  # refuses a run without any
    borders = common_borders(measure, run.config().diffusion.schedule, bins)
    rows = Rows(y, labels, seed)
    steps = tuple(checkpoint_step(path) for path in list_checkpoints(run.checkpoints))
    matrices = []
    for done, step in enumerate(steps):

        def report(part: int, parts: int, before: int = done) -> None:
            if progress is not None:
                progress(before * parts + part, len(steps) * parts)

        denoiser = run.denoiser(str(step), weights="model", device=y.device)
        bin_gradients = BinGradients(denoiser, rows, borders, measure, batch)
        fit = memory // (4 * sum(p.numel() for p in bin_gradients.parameters))
        try:
            matrices.append(cosines(inner_products(bin_gradients, bins, max(1, fit), report)))
        except UserError as error:
            raise UserError(f"{run.path}: step {step}: {error}") from None
    return Affinity(borders, torch.stack(matrices).mean(0), steps)


def common_borders(measure: VP, schedule: NoiseSchedule, bins: int) -> tuple[float, ...]:
    """Return the borders of equal bins of the times of `measure` whose sigmas a schedule has, too.

    Raises:
        UserError: if there are none.
    """
    ends = [float(measure.time(schedule.sigma(t))) for t in (schedule.t_min, schedule.t_max)]
    low, high = max(measure.t_min, ends[0]), min(measure.t_max, ends[1])
    if not low < high:
        raise UserError(f"diffusion.schedule={schedule.kind!r}: has no noise between t_min and t_max of the {measure}")
    return tuple(torch.linspace(low, high, bins + 1, dtype=torch.float64).round(decimals=9).tolist())


def shared_parameters(denoiser: MultiStageDenoiser) -> list[nn.Parameter]:
    """Return the parameters that work at every noise level: all of one stage's, else those of the shared encoder.

    Raises:
        UserError: if there are several stages, each with an encoder of its own.
    """
    parts = denoiser.network.parts()
    if len(denoiser.stages) == 1:
        return [p for part in parts.values() for p in part.parameters()]
    if "encoder" not in parts:
        raise UserError("network.separate=True: the stages share no parameters to compare; take a run of one stage")
    return list(parts["encoder"].parameters())


class Rows:
    """Images, and the unit noise and place inside a bin that they have in every bin (common random numbers)."""

    def __init__(self, y: Tensor, labels: Tensor | None, seed: int) -> None:
        row = torch.arange(len(y), device=y.device)
        self.y, self.labels = y, labels
        self.noise = rng.normal((seed, "gradient-noise"), row, y.shape[1:])
        # spread evenly, as held-out rows are; ascending, so that rows of a bin across an edge are sorted by stage
        self.place = (row + rng.uniform((seed, "gradient-time"), row, 1)[:, 0]) / len(y)

    def batches(self, denoiser: MultiStageDenoiser, low: float, high: float, measure: VP, size: int) -> Iterator[Batch]:
        """Yield the rows at times between low and high, some at a time."""
        sigma = measure.sigma(low + (high - low) * self.place)
        stage = denoiser.stages.index(sigma)
        for start in range(0, len(self.y), size):
            part = slice(start, start + size)
            counts = torch.bincount(stage[part], minlength=len(denoiser.stages)).tolist()
            cond = None if self.labels is None else Conditioning(labels=self.labels[part])
            yield Batch(self.y[part], self.noise[part], sigma[part], tuple(counts), cond)


class BinGradients:
    """Computes the gradient of any bin's mean loss, as one vector (P,)."""

    def __init__(
        self, denoiser: MultiStageDenoiser, rows: Rows, borders: Sequence[float], measure: VP, batch: int
    ) -> None:
        self.denoiser, self.rows, self.measure, self.batch = denoiser, rows, measure, batch
        self.bins = list(itertools.pairwise(borders))
        self.parameters = [p.requires_grad_() for p in shared_parameters(denoiser)]

    def __call__(self, k: int) -> Tensor:
        """Return the gradient of bin k."""
        total = torch.zeros((), device=self.rows.y.device)
        for batch in self.rows.batches(self.denoiser, *self.bins[k], self.measure, self.batch):
            loss = torch.stack(stage_losses(self.denoiser, batch)).sum() / len(self.rows.y)
            parts = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            total = torch.cat([part.flatten() for part in parts]) + total
        return total


def inner_products(vector: Callable[[int], Tensor], count: int, fit: int, report: Progress) -> Tensor:
    """Return the inner products of all pairs of vectors, summed in float64.

    Args:
        vector: makes vector k, again and again if need be.
        count: number of vectors.
        fit: how many are kept at a time, beside the one just made.
        report: called with (vectors made, vectors to make).

    Returns:
        float64 (count, count), symmetric, on the CPU.
    """
    products = torch.zeros(count, count, dtype=torch.float64)
    made, total = 0, sum(range(count, 0, -fit))
    for start in range(0, count, fit):
        kept: list[Tensor] = []
        for k in range(start, count):
            new = vector(k)
            if len(kept) < fit:
                kept.append(new)
            column = torch.stack([_inner(old, new) for old in kept]).cpu()
            products[start : start + len(kept), k] = products[k, start : start + len(kept)] = column
            del new  # before the next is made, if it is not kept
            made += 1
            report(made, total)
    return products


def _inner(a: Tensor, b: Tensor) -> Tensor:
    parts = zip(torch.split(a, _NUMBERS), torch.split(b, _NUMBERS), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in parts]).sum()


def cosines(products: Tensor) -> Tensor:
    """Return the cosines of vectors, given all their inner products, float64 (M, M).

    Raises:
        UserError: if a vector is zero or not finite.
    """
    norms = products.diagonal().sqrt()
    bad = torch.nonzero(~(torch.isfinite(norms) & (norms > 0)))[:, 0].tolist()
    if bad:
        raise UserError(f"the gradient of bin {bad[0] + 1} of {len(products)} is zero or not finite: no direction")
    return (products / norms[:, None] / norms[None, :]).clamp(-1.0, 1.0).fill_diagonal_(1.0)
