"""Training rows as pure functions of (seed, step, stage, row): which images, how noisy, flipped or not, labelled or not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import rng
from ..config import RunConfig, TrainingConfig
from ..contracts import Conditioning
from ..data import to_float
from ..distributed import share
from ..errors import UserError
from ..schedules import SigmaPrior
from ..stages import Stages
from .augment import LABELS, augment


class TrainingData(Protocol):
    """Images or latents at rest (data.ImageData is one).

    Where `tensor` is floats, an attribute `mirrored` holds the same of the mirrored images, for training.flip, or None.
    """

    @property
    def name(self) -> str:
        """What the data are called in messages."""

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class numbers (N,), or None."""

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W) of a row."""

    def __len__(self) -> int: ...

    def tensor(self) -> Tensor:
        """Return all rows (N, C, H, W): uint8 pixels, or float32 latents as the network is to see them."""


@dataclass(frozen=True)
class Batch:
    """Rows sorted by stage.

    Attributes:
        y: clean images in [-1, 1], or latents, float32 (B, C, H, W).
        noise: standard normal, same shape.
        sigma: float64 (B,).
        counts: rows of each stage.
        cond: class and augmentation labels, or None.
    """

    y: Tensor
    noise: Tensor
    sigma: Tensor
    counts: tuple[int, ...]
    cond: Conditioning | None

    @property
    def noisy(self) -> Tensor:
        """y + sigma noise, in y's type."""
        return self.y + self.sigma.to(self.y.dtype)[:, None, None, None] * self.noise

    def to(self, dtype: torch.dtype) -> Batch:
        """Return the batch with images and noise of another type; sigma stays float64."""
        return dataclasses.replace(self, y=self.y.to(dtype), noise=self.noise.to(dtype))

    def part(self, rows: range) -> Batch:
        """Return consecutive rows of a batch of one stage."""
        s = slice(rows.start, rows.stop)
        counts = tuple(len(rows) if count else 0 for count in self.counts)
        cond = None if self.cond is None else self.cond.rows(s)
        return Batch(self.y[s], self.noise[s], self.sigma[s], counts, cond)

    def shards(self, most: int) -> list[Batch]:
        """Return the batch in at most so many parts, each with its share of every stage's rows, none without any."""
        parts, found = min(most, max(self.counts)), []
        stages = torch.split(torch.arange(len(self.y)), list(self.counts))
        for part in range(parts):
            # each stage begins with another part, so that what does not divide evenly does not pile up on one
            own = [share(len(rows), (part + k) % parts, parts) for k, rows in enumerate(stages)]
            rows = torch.cat([rows[s.start : s.stop] for rows, s in zip(stages, own, strict=True)])
            cond = None if self.cond is None else self.cond.rows(rows)
            found.append(Batch(self.y[rows], self.noise[rows], self.sigma[rows], tuple(map(len, own)), cond))
        return found


def stage_shares(training: TrainingConfig, stages: Stages, prior: SigmaPrior) -> tuple[float, ...]:
    """Return the share of rows (or of steps) that each stage gets; they add up to 1."""
    if training.shares == "prior":
        return prior_masses(stages, prior)
    raw = (1.0,) * len(stages) if training.shares == "uniform" else training.shares
    return tuple(s / sum(raw) for s in raw)


def stage_weights(training: TrainingConfig, stages: Stages, prior: SigmaPrior) -> tuple[float, ...]:
    """Return lambda_k of the objective sum_k lambda_k (mean loss of stage k), scaled to add up to 1."""
    if training.weights == "prior":
        return prior_masses(stages, prior)
    if training.weights == "shares":
        return stage_shares(training, stages, prior)
    return tuple(w / sum(training.weights) for w in training.weights)


def prior_masses(stages: Stages, prior: SigmaPrior) -> tuple[float, ...]:
    """Return the training density's mass on each stage."""
    return tuple(prior.mass(*stages.interval(k)) for k in range(len(stages)))


def allocate(batch: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Divide a batch over the stages by largest remainder, at least one row for each stage with a share.

    The counts are the same at every step: shapes stay static, and the objective's weights never depend on them.

    Raises:
        UserError: if there are fewer rows than stages.
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
    """Return the rows of each stage in a step that trains it: the whole batch where a step trains one stage only."""
    if training.update_mode == "one-stage":
        return (training.batch,) * len(shares)
    return allocate(training.batch, shares)


class BatchSource:
    """Draws training rows from a data set, kept as it is at rest, on the device when it fits there.

    Raises:
        UserError: if the data have no labels or too many classes for the network, cannot be flipped, or the network has
            no input for what was augmented.
    """

    device_budget = 4 << 30  # bytes of images kept on an accelerator

    def __init__(self, config: RunConfig, data: TrainingData, device: torch.device) -> None:
        self.training, self.stages, self.prior = config.training, config.stages, config.diffusion.prior
        self.device = device
        self._check(config, data)
        self.images = data.tensor()
        # the latents of mirrored images; pixels are mirrored as they are drawn
        self.mirrored: Tensor | None = getattr(data, "mirrored", None) if self.training.flip else None
        if self.training.flip and self.images.is_floating_point() and self.mirrored is None:
            raise UserError(
                f"training.flip=True but data {data.name!r} has no mirrored latents, and a mirrored latent is not the latent "
                "of the mirrored image; set it to False"
            )
        kept = self.images.nbytes + (0 if self.mirrored is None else self.mirrored.nbytes)
        if device.type != "cpu" and kept <= self.device_budget:
            self.images = self.images.to(device)
            self.mirrored = None if self.mirrored is None else self.mirrored.to(device)
        wanted = config.network.num_classes > 0 and data.labels is not None
        self.labels = torch.from_numpy(data.labels).to(device) if wanted else None
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._transfers = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @staticmethod
    def _check(config: RunConfig, data: TrainingData) -> None:
        classes, training = config.network.num_classes, config.training
        if classes and data.labels is None:
            raise UserError(f"network.num_classes={classes} but data {data.name!r} has no labels; set it to 0")
        if classes and data.num_classes > classes:
            raise UserError(
                f"network.num_classes={classes} but data {data.name!r} has {data.num_classes} classes; set it to that"
            )
        if training.augment and config.network.augment_dim != LABELS:
            raise UserError(
                f"training.augment={training.augment} needs network.augment_dim={LABELS}, not "
                f"{config.network.augment_dim}: the network must be told what was done to an image"
            )

    def draw(
        self, step: int, counts: Sequence[int], of: Sequence[range] | None = None, part: int = 0, parts: int = 1
    ) -> Batch:
        """Draw the rows of one step, or one of several equal parts of them (gradient accumulation).

        Row r of stage k is the same whatever the other stages' counts, the parts or the number of processes.

        Args:
            step: from 0.
            counts: rows of each stage in the whole step.
            of: this process's rows among them; None: all.
            part, parts: which part of these.
        """
        whole = of or [range(count) for count in counts]
        dealt = [share(len(rows), part, parts) for rows in whole]
        own = [rows.start + torch.arange(s.start, s.stop) for rows, s in zip(whole, dealt, strict=True)]
        sizes = [len(row) for row in own]
        rows = torch.cat([(stage << 32) + row for stage, row in enumerate(own)])
        uniforms = torch.split(rng.uniform((self.training.seed, "sigma", step), rows, 1)[:, 0], sizes)
        picks, sigmas = [], []
        for stage, (row, u) in enumerate(zip(own, uniforms, strict=True)):
            if len(row):
                sigmas.append(self._sigma(step, stage, u, (stage << 32) + row))
                picks.append(self._pick(stage, step * counts[stage] + row))
        return self._assemble(step, torch.cat(picks), torch.cat(sigmas), rows, tuple(sizes))

    def _sigma(self, step: int, stage: int, u: Tensor, rows: Tensor) -> Tensor:
        """Map uniforms to the stage's interval, widened by the overlap, or, where a coin says so, to the whole prior.

        Those are the soft intervals of Lee et al. 2024, "Multi-architecture multi-expert diffusion models".
        """
        low, high = self.stages.interval(stage)
        widening = math.exp(self.training.overlap)
        sigma = self.prior.sample_within(u, low / widening, high * widening)
        soft = self.training.soft_intervals
        share = soft[stage] if isinstance(soft, tuple) else soft
        if share:
            coins = rng.uniform((self.training.seed, "soft intervals", step), rows, 1)[:, 0]
            sigma = torch.where(coins < share, self.prior.sample(u), sigma)
        return sigma

    def _pick(self, stage: int, position: Tensor) -> Tensor:
        """Return the images at positions of a stage's endless stream, a fresh permutation for every epoch.

        Where steps train one stage each, a stage skips the positions of the steps that were not its own.
        """
        size = len(self.images)
        picked = torch.empty_like(position)
        for epoch in torch.unique(position // size).tolist():
            inside = position // size == epoch
            picked[inside] = self._order(stage, epoch)[position[inside] % size]
        return picked

    def _order(self, stage: int, epoch: int) -> Tensor:
        known = self._orders.get(stage)
        if known is None or known[0] != epoch:
            order = torch.randperm(
                len(self.images), generator=rng.generator((self.training.seed, "order", stage, epoch))
            )
            known = self._orders[stage] = (epoch, order)
        return known[1]

    def _assemble(self, step: int, pick: Tensor, sigma: Tensor, rows: Tensor, counts: tuple[int, ...]) -> Batch:
        seed, training = self.training.seed, self.training
        rows, sigma = self._sent(rows), self._sent(sigma)
        y = self._rows(self.images, pick)
        noise = rng.normal((seed, "noise", step), rows, y.shape[1:])
        labels = done = None
        if training.augment:
            y, done = augment(y, training.augment, (seed, "augment", step), rows, flip=training.flip)
        elif training.flip:
            coins = rng.uniform((seed, "flips", step), rows, 1)
            mirrored = y.flip(-1) if self.mirrored is None else self._rows(self.mirrored, pick)
            y = torch.where((coins[:, 0] < 0.5)[:, None, None, None], mirrored, y)
        if self.labels is not None:
            labels = self.labels[self._sent(pick)]
            coins = rng.uniform((seed, "labels", step), rows, 1)
            labels = torch.where(coins[:, 0] < training.label_dropout, -1, labels)
        cond = None if labels is None and done is None else Conditioning(labels=labels, augment=done)
        return Batch(y, noise, sigma, counts, cond)

    def _rows(self, data: Tensor, pick: Tensor) -> Tensor:
        there = data.device.type == self.device.type
        at_rest = data[self._sent(pick)] if there else self._sent(data[pick])
        return _as_float(at_rest)

    def _sent(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device. A GPU is not waited for: it gets the rows of a step while at work on the one before."""
        if self._transfers is None:
            return tensor
        with torch.cuda.stream(self._transfers):
            sent = tensor.pin_memory().to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._transfers)
        sent.record_stream(now)
        return sent


def _as_float(rows: Tensor) -> Tensor:
    """Map pixels to [-1, 1]; latents are what the network is to see."""
    return rows if rows.is_floating_point() else to_float(rows)


def held_out_batch(config: RunConfig, data: TrainingData, stage: int, device: torch.device) -> Batch:
    """Return one stage's held-out rows: the same images and noise at every evaluation, labels kept.

    Nothing is flipped, augmented or drawn from beyond the stage's own interval.
    """
    count = config.training.held_out_rows
    row = torch.arange(count)
    key = (config.training.seed, "held-out", stage)
    # evenly spread noise levels: a stratified draw has far less variance than an independent one
    u = (row + rng.uniform(key, row, 1)[:, 0]) / count
    # in a drawn order: files come sorted by class, and rows by noise level
    order = torch.randperm(len(data), generator=rng.generator((config.training.seed, "held-out images")))
    pick = order[row % len(data)]
    y = _as_float(data.tensor()[pick]).to(device)
    labels = torch.from_numpy(data.labels[pick.numpy()]).to(device) if data.labels is not None else None
    return Batch(
        y=y,
        noise=rng.normal(key, row.to(device), y.shape[1:]),
        sigma=config.diffusion.prior.sample_within(u, *config.stages.interval(stage)).to(device),
        counts=tuple(count if k == stage else 0 for k in range(len(config.stages))),
        cond=Conditioning(labels=labels) if config.network.num_classes else None,
    )
