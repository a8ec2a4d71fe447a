"""Forward and backward passes of a training step on this process, and those of held-out losses."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import rng
from ..config import RunConfig
from ..denoisers import MultiStageDenoiser
from ..performance.devices import autocast_dtype
from ..performance.execution import Execution, Graphs, check_execution, execute
from ..performance.timing import PassTimer, Timer
from ..progress import Progress
from .batches import Batch, BatchSource, TrainingData, held_out_batch
from .callbacks import StepAbandoned
from .losses import objective, row_losses, stage_losses, stage_sums
from .metrics import StepMetrics
from .optimizer import Optimization
from .strategies import MicroBatch, Strategy

if TYPE_CHECKING:
    from .thread_parallel import ThreadParallel


def _threads(number: int) -> ThreadParallel | None:
    """Return what computes a batch on several threads; None for one."""
    if number == 1:
        return None
    from .thread_parallel import ThreadParallel

    return ThreadParallel(number)


def dropout_key(seed: int, step: int, rank: int) -> rng.Key:
    """Return the random key of a step's dropout masks; ranks train different rows, so their masks differ, too."""
    return (seed, "dropout", step, rank) if rank else (seed, "dropout", step)


class Passes:
    """Computes the gradients of the objective over this process's rows.

    Args:
        config: of the run.
        denoiser: network in training.
        source: draws the batches.
        strategy: assigns rows to processes and sums gradients over them.
        optimization: scales the loss.

    Attributes:
        autocast: dtype of autocast; None for fp32 and fp64.
        timer: times the parts of a step while it is running.
        execution: how passes are computed, see `compute`.
    """

    execution: Execution

    def __init__(
        self,
        config: RunConfig,
        denoiser: MultiStageDenoiser,
        source: BatchSource,
        strategy: Strategy,
        optimization: Optimization,
    ) -> None:
        self.config, self.denoiser, self.source = config, denoiser, source
        self.strategy, self.optimization = strategy, optimization
        self.autocast = autocast_dtype(config.training.precision, source.device)
        self.timer = Timer(source.device)
        self._pass_timer = PassTimer(self.timer)
        self._abandoned = self._abandonable = False

    def watch(self) -> None:
        """Measure the encoders of the network; called again after branching."""
        self._pass_timer.watch(self.denoiser.network.encoders)

    def compute(self, execution: Execution) -> None:
        """Use this execution for the following passes.

        Raises:
            UserError: if it does not suit the device or the number of processes.
        """
        check_execution(execution, self.source.device, self.strategy.world.size)
        self.execution = execution
        self._threads = _threads(execution.thread_parallel)
        execute(self.denoiser.network, execution)
        self.denoiser.graphs = Graphs(self.denoiser.network) if execution.cuda_graphs else None

    def abandon(self) -> None:
        """Give up abandonable passes, those in progress or else the next; the thread that computes them calls it.

        Raises:
            StepAbandoned: if such passes are in progress.
        """
        self._abandoned = True
        if self._abandonable:
            raise StepAbandoned

    @contextmanager
    def abandonable(self, allowed: bool) -> Iterator[None]:
        """Let `abandon` end the passes in the block, if they are compiled, which takes minutes, on a single process.

        Args:
            allowed: whether nothing is lost by it.

        Raises:
            StepAbandoned: in the place that `abandon` interrupts, or at once.
        """
        self._abandonable = allowed and self.execution.compile and self.strategy.world.size == 1
        try:
            if self._abandonable and self._abandoned:
                raise StepAbandoned
            yield
        except Exception as error:
            if self._abandonable and self._abandoned:  # what `abandon` interrupted has put its own error in place
                raise StepAbandoned from error
            raise
        finally:
            self._abandonable = False

    def prefetch(self, step: int, updates: Iterable[tuple[tuple[int, ...], tuple[float, ...]]]) -> None:
        """Begin to read the rows that this process will draw in a step, see `BatchSource.prefetch`.

        Args:
            step: iteration, from 0.
            updates: rows of each stage in each update of the step, and weights, which are not used.
        """
        accumulate = self.config.training.accumulate
        draws = ((c, part.rows) for c, _ in updates for part in self.strategy.micro_batches(c, accumulate))
        self.source.prefetch(step, draws)

    def gradients(self, step: int, counts: tuple[int, ...], weights: tuple[float, ...]) -> Tensor:
        """Accumulate gradients, and sum them over processes.

        Args:
            step: iteration, from 0.
            counts: rows of each stage in the whole step.
            weights: lambda_k of the objective.

        Returns:
            The summed loss of each stage over this process's rows.
        """
        totals = torch.zeros(len(counts), device=self.source.device)
        micro_batches = self.strategy.micro_batches(counts, self.config.training.accumulate)
        if not micro_batches:
            self.strategy.expect(counts)
        for number, micro_batch in enumerate(micro_batches):
            with self.timer.part("data"):
                batch = self.source.draw(step, counts, micro_batch.rows)
            forward = partial(self._forward, micro_batch=micro_batch, counts=counts, weights=weights)
            if self._threads is not None:
                key = (*dropout_key(self.config.training.seed, step, 0), *counts, number)
                totals += self._threads.backward(batch, self.optimization.parameters, forward, self._pass_timer, key)
                continue
            sums, loss = forward(batch)
            if number == len(micro_batches) - 1:
                self.strategy.expect(counts)
            with self._pass_timer.backward():
                loss.backward()  # type: ignore[no-untyped-call]
            totals += sums
        with self.timer.part("gradients"):
            self.strategy.sum_gradients()
            if self.optimization.weighting is not None:
                self.optimization.weighting.sum_gradient(self.strategy.world)
        return totals

    def clip(self, step: int, counts: tuple[int, ...], totals: Tensor, *, stopping: bool) -> StepMetrics:
        """Unscale and clip gradients; return the mean losses of the stages and the gradient norms of the parts.

        Args:
            step: iteration, from 0.
            counts: rows of each stage in the whole step.
            totals: see `gradients`.
            stopping: whether this process has requested a stop.
        """
        optimization = self.optimization
        if optimization.scaler.is_enabled():
            self.strategy.sync_overflow(optimization.gradients)
        optimization.unscale()
        names = list(self.denoiser.network.parts())
        totals, norms = self.strategy.reduce_metrics(totals, optimization.parts, names, stopping=stopping)
        optimization.clip(norms)
        losses = [total / max(c, 1) for total, c in zip(totals, counts, strict=True)]
        values = torch.cat([torch.stack(losses), torch.stack(list(norms.values()))])
        return StepMetrics(step + 1, counts, tuple(norms), values)

    @torch.no_grad()
    def held_out_losses(self, denoiser: MultiStageDenoiser, data: TrainingData, progress: Progress) -> list[float]:
        """Return the mean loss of each stage on held-out rows, with fixed images and noise; all processes call it.

        Args:
            denoiser: as far as this process holds it.
            data: the held-out images.
            progress: called with (stages done, stages) before each pass, none of which has more rows than one of the training.
        """
        training, stages = self.config.training, range(len(self.config.stages))
        count, most = training.held_out_rows, math.ceil(training.batch / training.accumulate)
        world, totals = self.strategy.world, torch.zeros(len(stages), dtype=torch.float64, device=self.source.device)
        for stage in stages:
            progress(stage, len(stages))
            rows = held_out_batch(self.config, data, stage, self.source.device)
            for micro_batch in self.strategy.micro_batches(rows.counts, math.ceil(count / most)):
                progress(stage, len(stages))
                with world.translate_errors():
                    loss = stage_losses(denoiser, rows.part(micro_batch.rows[stage]))[stage]
                totals[stage] += loss if micro_batch.counted[stage] else 0.0
        return [total / count for total in world.all_reduce(totals).tolist()]

    def _forward(
        self, batch: Batch, micro_batch: MicroBatch, counts: tuple[int, ...], weights: tuple[float, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return the summed loss of each stage (detached) and the scaled objective for the backward pass."""
        device, weighting = self.source.device.type, self.optimization.weighting
        with self._pass_timer.forward(), torch.autocast(device, self.autocast, enabled=self.autocast is not None):
            rows = row_losses(self.denoiser, batch)
        sums = terms = stage_sums(rows, batch.counts, micro_batch.counted)
        if weighting is not None:
            terms = stage_sums(weighting(rows, batch.sigma), batch.counts, micro_batch.counted)
        return torch.stack(sums).detach(), self.optimization.scaler.scale(objective(terms, weights, counts))
