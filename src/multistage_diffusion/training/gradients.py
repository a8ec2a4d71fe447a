"""Cosine similarity between loss gradients at different noise levels: the affinity for gradient clustering.

This is the baseline of the paper's Table 4 (B.7), after Go et al. 2023, "Addressing negative transfer in diffusion
models": noise levels with similar gradient directions belong to one stage.
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
from ..progress import Progress
from ..schedules import NoiseSchedule
from ..schedules.vp import VP
from .batches import Batch
from .checkpoint import checkpoint_step, list_checkpoints
from .losses import stage_losses
from .run import Run

_NUMBERS = 1 << 22  # gradient entries per float64 dot product


class Affinity(NamedTuple):
    """Cosines between the gradients of M bins of time.

    Attributes:
        borders: borders of the bins, M + 1 times, ascending.
        matrix: cosines in [-1, 1], float64 (M, M), on the CPU; symmetric, ones on the diagonal.
        steps: steps of the checkpoints over which the cosines are averaged.
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

    The gradient of a bin is the gradient of the mean loss (squared error of F, see `stage_losses`) over R rows whose
    times are spread uniformly over the bin. All bins use the same images and unit noise. The weights are the training
    weights, not the averaged ones, without dropout and autocast. The gradient is taken with respect to the parameters
    that all noise levels share (`shared_parameters`). With a run of several stages, the result also reflects the run's
    own stage edges, where its decoders change. The paper uses a run of one stage and its checkpoints of every 50,000
    steps (training.keep_every) up to 450,000.

    Cost per checkpoint: M gradients of R rows if M gradients of P parameters (4 M P bytes) fit into `memory`. If only b
    fit, gradients are recomputed for every block of b: about M (M / b + 1) / 2 in total.

    Args:
        run: all its kept checkpoints are used.
        y: clean images in [-1, 1], or latents as the network's input, float32 (R, C, H, W); its device is used.
        labels: classes of the images, int64 (R,); None for a run without classes.
        measure: kernel that defines time; equal bins divide the times it has in common with the run's schedule.
        bins: M.
        batch: rows per forward and backward pass.
        memory: approximate bytes of gradients to keep; at least one gradient is kept.
        seed: seed of the noise and the times.
        progress: called with (gradients done, total).

    Raises:
        UserError: if the run has no checkpoint, or its stages share no parameters; if bins < 1; if schedule and measure
            have no time in common; or if a gradient is zero or not finite.
    """
    if bins < 1:
        raise UserError(f"bins={bins} must be at least 1")
    run.checkpoint("latest")  # raises if there is no checkpoint
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
    """Return the borders of equal bins over the times of `measure` whose sigmas the schedule also covers.

    Raises:
        UserError: if there are no such times.
    """
    ends = [float(measure.time(schedule.sigma(t))) for t in (schedule.t_min, schedule.t_max)]
    low, high = max(measure.t_min, ends[0]), min(measure.t_max, ends[1])
    if not low < high:
        raise UserError(f"diffusion.schedule={schedule.kind!r}: has no noise between t_min and t_max of the {measure}")
    return tuple(torch.linspace(low, high, bins + 1, dtype=torch.float64).round(decimals=9).tolist())


def shared_parameters(denoiser: MultiStageDenoiser) -> list[nn.Parameter]:
    """Return the parameters used at every noise level: all for a single stage, else those of the shared encoder.

    Raises:
        UserError: if there are several stages, each with its own encoder.
    """
    parts = denoiser.network.parts()
    if len(denoiser.stages) == 1:
        return [p for part in parts.values() for p in part.parameters()]
    if "encoder" not in parts:
        raise UserError("network.separate=True: the stages share no parameters to compare; take a run of one stage")
    return list(parts["encoder"].parameters())


class Rows:
    """Images with their unit noise and relative time in a bin, the same in every bin (common random numbers)."""

    def __init__(self, y: Tensor, labels: Tensor | None, seed: int) -> None:
        row = torch.arange(len(y), device=y.device)
        self.y, self.labels = y, labels
        self.noise = rng.normal((seed, "gradient-noise"), row, y.shape[1:])
        # stratified, as for held-out rows; ascending, so that the rows of a bin across a stage edge are sorted by stage
        self.place = (row + rng.uniform((seed, "gradient-time"), row, 1)[:, 0]) / len(y)

    def batches(self, denoiser: MultiStageDenoiser, low: float, high: float, measure: VP, size: int) -> Iterator[Batch]:
        """Yield the rows at times between low and high, `size` rows per batch."""
        sigma = measure.sigma(low + (high - low) * self.place)
        stage = denoiser.stages.index(sigma)
        for start in range(0, len(self.y), size):
            part = slice(start, start + size)
            counts = torch.bincount(stage[part], minlength=len(denoiser.stages)).tolist()
            cond = None if self.labels is None else Conditioning(labels=self.labels[part])
            yield Batch(self.y[part], self.noise[part], sigma[part], tuple(counts), cond)


class BinGradients:
    """Computes the gradient of a bin's mean loss as one vector (P,)."""

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
        vector: computes vector k; may be called several times for the same k.
        count: number of vectors.
        fit: number of vectors kept in memory, in addition to the newest one.
        report: called with (vectors computed, total).

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
            del new  # frees its memory before the next vector is computed, unless it is kept
            made += 1
            report(made, total)
    return products


def _inner(a: Tensor, b: Tensor) -> Tensor:
    parts = zip(torch.split(a, _NUMBERS), torch.split(b, _NUMBERS), strict=True)
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in parts]).sum()


def cosines(products: Tensor) -> Tensor:
    """Return the cosines between vectors from their inner products, float64 (M, M).

    Raises:
        UserError: if a vector is zero or not finite.
    """
    norms = products.diagonal().sqrt()
    bad = torch.nonzero(~(torch.isfinite(norms) & (norms > 0)))[:, 0].tolist()
    if bad:
        raise UserError(f"the gradient of bin {bad[0] + 1} of {len(products)} is zero or not finite: no direction")
    return (products / norms[:, None] / norms[None, :]).clamp(-1.0, 1.0).fill_diagonal_(1.0)
