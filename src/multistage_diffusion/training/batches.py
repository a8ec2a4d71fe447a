"""Training batches: image, noise level, flip and label of each row are pure functions of (seed, step, stage, row)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .. import rng
from ..config import RunConfig
from ..contracts import Conditioning
from ..data import to_float
from ..data.rows import Rows, batches, prefetch, read, row_type
from ..distributed import share
from ..errors import UserError
from ..progress import reading

_REFERENCES = -1  # the "stage" whose stream of images are the references
_AT_ONCE = 1024  # rows read at a time when all of them are moved to the device


class TrainingData(Rows, Protocol):
    """A data set of images or latents (for example data.ImageData).

    Its rows are uint8 pixels, or float32 latents as the network's input. For latents, an attribute `mirrored` holds the
    rows of the mirrored images (for training.flip), or None.
    """

    @property
    def name(self) -> str:
        """Name of the data in messages."""

    @property
    def labels(self) -> npt.NDArray[np.int64] | None:
        """Class numbers (N,), or None."""

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""


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
        """y + sigma noise, in y's dtype."""
        return self.y + self.sigma.to(self.y.dtype)[:, None, None, None] * self.noise

    def to(self, dtype: torch.dtype) -> Batch:
        """Return the batch with images and noise of another dtype; sigma stays float64."""
        return dataclasses.replace(self, y=self.y.to(dtype), noise=self.noise.to(dtype))

    def part(self, rows: range) -> Batch:
        """Return consecutive rows of a batch of one stage."""
        s = slice(rows.start, rows.stop)
        counts = tuple(len(rows) if count else 0 for count in self.counts)
        cond = None if self.cond is None else self.cond.rows(s)
        return Batch(self.y[s], self.noise[s], self.sigma[s], counts, cond)

    def shards(self, most: int) -> list[Batch]:
        """Split the batch into at most `most` non-empty parts, each with its share of every stage's rows."""
        parts, found = min(most, max(self.counts)), []
        stages = torch.split(torch.arange(len(self.y)), list(self.counts))
        for part in range(parts):
            # each stage starts with a different part, so that remainders do not accumulate in one part
            own = [share(len(rows), (part + k) % parts, parts) for k, rows in enumerate(stages)]
            rows = torch.cat([rows[s.start : s.stop] for rows, s in zip(stages, own, strict=True)])
            cond = None if self.cond is None else self.cond.rows(rows)
            found.append(Batch(self.y[rows], self.noise[rows], self.sigma[rows], tuple(map(len, own)), cond))
        return found


class BatchSource:
    """Draws training batches from a data set.

    Each draw reads the rows it needs. An accelerator keeps all rows, in their stored type, if they fit `device_budget`.

    Raises:
        UserError: if the data have no labels or too many classes for the network, or cannot be flipped, or the network
            has no input for augmentation labels.
    """

    device_budget = 4 << 30  # largest data set, in bytes, kept on an accelerator

    def __init__(self, config: RunConfig, data: TrainingData, device: torch.device) -> None:
        self.training, self.stages, self.prior = config.training, config.stages, config.diffusion.prior
        self.device = device
        self._check(config, data)
        self.shape = data.shape
        self.data: Rows | Tensor = data
        # latents of the mirrored images; pixels are mirrored when drawn
        self.mirrored: Rows | Tensor | None = getattr(data, "mirrored", None) if self.training.flip else None
        kind = row_type(data)
        if self.training.flip and kind != np.uint8 and self.mirrored is None:
            raise UserError(
                f"training.flip=True but data {data.name!r} has no mirrored latents, and a mirrored latent is not the latent "
                "of the mirrored image; set it to False"
            )
        sides = 1 if self.mirrored is None else 2
        if device.type != "cpu" and sides * len(data) * math.prod(data.shape) * kind.itemsize <= self.device_budget:
            self.data = _on_device(data, device)
            self.mirrored = None if self.mirrored is None else _on_device(self.mirrored, device)
        wanted = config.network.num_classes > 0 and data.labels is not None
        self.labels = torch.from_numpy(data.labels).to(device) if wanted else None
        self._orders: dict[int, tuple[int, Tensor]] = {}
        self._references: tuple[int, Tensor, Tensor] | None = None
        self._transfers = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @staticmethod
    def _check(config: RunConfig, data: TrainingData) -> None:
        classes, training = config.network.num_classes, config.training
        if classes and data.labels is None:
            raise UserError(f"network.num_classes={classes} but data {data.name!r} has no labels; set it to 0")
        if classes and data.num_classes > classes:
            raise UserError(
                f"network.num_classes={classes} but data {data.name!r} has {data.num_classes} classes; give --set "
                f"network.num_classes={data.num_classes}"
            )
        if not training.augment:
            return
        from .augment import LABELS  # most runs do not augment

        if config.network.augment_dim != LABELS:
            raise UserError(
                f"training.augment={training.augment} needs network.augment_dim={LABELS}, not "
                f"{config.network.augment_dim}: the network must be told what was done to an image"
            )

    def draw(self, step: int, counts: Sequence[int], of: Sequence[range] | None = None) -> Batch:
        """Draw the rows of one step, or some of them.

        Row r of stage k does not depend on the other stages' counts, on the other rows or on the number of processes.

        Args:
            step: iteration, from 0.
            counts: rows of each stage in the whole step.
            of: consecutive rows of each stage to draw. None: all.
        """
        own = [torch.arange(rows.start, rows.stop) for rows in of or [range(count) for count in counts]]
        sizes = [len(row) for row in own]
        rows = torch.cat([(stage << 32) + row for stage, row in enumerate(own)])
        uniforms = torch.split(rng.uniform((self.training.seed, "sigma", step), rows, 1)[:, 0], sizes)
        picks, sigmas = [], []
        for stage, (row, u) in enumerate(zip(own, uniforms, strict=True)):
            if len(row):
                sigmas.append(self._sigma(step, stage, u, (stage << 32) + row))
                picks.append(self._pick(stage, step * counts[stage] + row))
        return self._assemble(step, torch.cat(picks), torch.cat(sigmas), rows, tuple(sizes))

    def prefetch(self, step: int, draws: Iterable[tuple[Sequence[int], Sequence[range]]]) -> None:
        """Begin to read, in the background, the rows of a step that will be drawn soon; on a device they are there already.

        Args:
            step: iteration, from 0.
            draws: `counts` and `of` of each draw of the step, in order.
        """
        if isinstance(self.data, Tensor):
            return
        picks = [self._reference_pick(step)] if self.training.reference_rows else []
        picks += [
            self._pick(stage, step * counts[stage] + torch.arange(rows.start, rows.stop))
            for counts, of in draws
            for stage, rows in enumerate(of)
            if len(rows)
        ]
        if picks:
            prefetch(self.data, torch.cat(picks).numpy())

    def _sigma(self, step: int, stage: int, u: Tensor, rows: Tensor) -> Tensor:
        """Map uniforms to the stage's interval, widened by training.overlap, or at random to the whole prior.

        The latter are the soft intervals of Lee et al. 2024, "Multi-architecture multi-expert diffusion models": a row
        uses the whole prior with probability training.soft_intervals.
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
        """Return the image indices at positions of a stage's infinite stream, with a new permutation in every epoch.

        With "one-stage", a stage skips the positions of the steps that train other stages.
        """
        size = len(self.data)
        picked = torch.empty_like(position)
        for epoch in torch.unique(position // size).tolist():
            inside = position // size == epoch
            picked[inside] = self._order(stage, epoch)[position[inside] % size]
        return picked

    def _order(self, stage: int, epoch: int) -> Tensor:
        known = self._orders.get(stage)
        if known is None or known[0] != epoch:
            order = torch.randperm(len(self.data), generator=rng.generator((self.training.seed, "order", stage, epoch)))
            known = self._orders[stage] = (epoch, order)
        return known[1]

    def _assemble(self, step: int, pick: Tensor, sigma: Tensor, rows: Tensor, counts: tuple[int, ...]) -> Batch:
        seed, training = self.training.seed, self.training
        rows, sigma = self._sent(rows), self._sent(sigma)
        labels = done = None
        if training.augment:
            from .augment import augment

            y = self._rows(self.data, pick)
            y, done = augment(y, training.augment, (seed, "augment", step), rows, flip=training.flip)
        else:
            y = self._flipped(pick, ("flips", step), rows)
        noise = rng.normal((seed, "noise", step), rows, y.shape[1:])
        if self.labels is not None:
            labels = self.labels[self._sent(pick)]
            coins = rng.uniform((seed, "labels", step), rows, 1)
            labels = torch.where(coins[:, 0] < training.label_dropout, -1, labels)
        if training.reference_rows:
            y, noise = self._averaged(step, pick, y, noise, sigma, labels)
        cond = None if labels is None and done is None else Conditioning(labels=labels, augment=done)
        return Batch(y, noise, sigma, counts, cond)

    def _flipped(self, pick: Tensor, key: tuple[str, int], rows: Tensor) -> Tensor:
        """Return images, with training.flip half of them mirrored: by random numbers of a key and rows."""
        y = self._rows(self.data, pick)
        if not self.training.flip:
            return y
        coins = rng.uniform((self.training.seed, *key), rows, 1)
        mirrored = y.flip(-1) if self.mirrored is None else self._rows(self.mirrored, pick)
        return torch.where((coins[:, 0] < 0.5)[:, None, None, None], mirrored, y)

    def _reference_pick(self, step: int) -> Tensor:
        """Return the indices of a step's reference images, the same for all its draws."""
        count = self.training.reference_rows
        return self._pick(_REFERENCES, step * count + torch.arange(count))

    def _averaged(
        self, step: int, pick: Tensor, y: Tensor, noise: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return y and noise with targets that are averaged over the step's references, see `stable_target`."""
        from .stable_target import averaged  # most runs have no references

        if self._references is None or self._references[0] != step:
            references = self._reference_pick(step)
            rows = self._sent(torch.arange(len(references)))
            self._references = (
                step,
                self._sent(references),
                self._flipped(references, ("reference flips", step), rows),
            )
        _, indices, images = self._references
        used = self._sent(pick)[:, None] != indices  # a row's own image counts once
        if labels is not None and self.labels is not None:
            used &= (labels[:, None] == self.labels[indices]) | (labels < 0)[:, None]
        return averaged(y, noise, sigma, images, used)

    def _rows(self, data: Rows | Tensor, pick: Tensor) -> Tensor:
        drawn = data[self._sent(pick)] if isinstance(data, Tensor) else self._sent(read(data, pick))
        return _as_float(drawn)

    def _sent(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the device.

        On CUDA the copy is asynchronous and overlaps with the computation of the previous step.
        """
        if self._transfers is None:
            return tensor
        with torch.cuda.stream(self._transfers):
            sent = tensor.pin_memory().to(self.device, non_blocking=True)
        now = torch.cuda.current_stream(self.device)
        now.wait_stream(self._transfers)
        sent.record_stream(now)
        return sent


def _on_device(data: Rows | Tensor, device: torch.device) -> Tensor:
    """Return all rows on a device; the CPU holds a part of them at a time."""
    parts = batches(data, _AT_ONCE)
    first = next(parts).to(device)
    rows = torch.empty(len(data), *first.shape[1:], dtype=first.dtype, device=device)
    rows[: len(first)] = first
    with reading() as told:
        for number, part in enumerate(parts, 1):
            rows[number * _AT_ONCE :][: len(part)] = part.to(device)
            told(min(len(data), (number + 1) * _AT_ONCE), len(data))
    return rows


def _as_float(rows: Tensor) -> Tensor:
    """Map uint8 pixels to [-1, 1]; return float latents unchanged."""
    return rows if rows.is_floating_point() else to_float(rows)


def held_out_batch(config: RunConfig, data: TrainingData, stage: int, device: torch.device) -> Batch:
    """Return the held-out rows of one stage, with the same images and noise in every evaluation.

    There is no flip, no augmentation and no label dropout; sigma stays in the stage's own interval.
    """
    count = config.training.held_out_rows
    row = torch.arange(count)
    key = (config.training.seed, "held-out", stage)
    # stratified noise levels have far less variance than independent ones
    u = (row + rng.uniform(key, row, 1)[:, 0]) / count
    # shuffled: files are sorted by class, and rows by noise level
    order = torch.randperm(len(data), generator=rng.generator((config.training.seed, "held-out images")))
    pick = order[row % len(data)]
    y = _as_float(read(data, pick)).to(device)
    labels = torch.from_numpy(data.labels[pick.numpy()]).to(device) if data.labels is not None else None
    return Batch(
        y=y,
        noise=rng.normal(key, row.to(device), y.shape[1:]),
        sigma=config.diffusion.prior.sample_within(u, *config.stages.interval(stage)).to(device),
        counts=tuple(count if k == stage else 0 for k in range(len(config.stages))),
        cond=Conditioning(labels=labels) if config.network.num_classes else None,
    )
