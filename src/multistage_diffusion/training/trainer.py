"""The trainer: trains one run from the start or its latest checkpoint to the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import rng
from ..config import RunConfig
from ..denoisers import MultiStageDenoiser, build_denoiser
from ..distributed import ALONE, World
from ..errors import UserError
from ..performance.autotune import check_execution, choose, settled
from ..performance.devices import autocast_dtype, resolve_device
from ..performance.execution import Execution, Graphs, execute
from ..performance.timing import PassTimer, Timer
from . import branching
from . import checkpoint as ckpt
from .batches import Batch, BatchSource, TrainingData, held_out_batch, row_counts, stage_shares, stage_weights
from .callbacks import Callback
from .ema import EMA
from .gradient_sync import GradientSync
from .losses import objective, stage_losses, updates
from .metrics import MetricAccumulator, MetricsReporter, StepMetrics, refuse, refuse_scale
from .optimizer import clip, learning_rate, make_optimizer, parameters_by_part, part_norms
from .run import Run
from .state import restore, snapshot
from .strategies import Strategy, make_layout
from .thread_parallel import ThreadParallel, backward
from .warm_start import WarmStart, warm_start


class Trainer:
    """Trains one run.

    Args:
        run: folder of the run, with its configuration. Training resumes from the latest checkpoint, if there is one.
        data: training images.
        held_out: held-out images, or None.
        config: replaces the configuration in the run's folder (for example to extend a resumed run).
        device: default: CUDA if available, else the CPU.
        callbacks: see Callback.
        world: the processes that train the run together; each has its own trainer.
        strategy: what each process holds, see strategies.py.

    Raises:
        UserError: if data, run, configuration and world do not match.
    """

    def __init__(
        self,
        run: Run,
        data: TrainingData,
        held_out: TrainingData | None = None,
        *,
        config: RunConfig | None = None,
        device: str | torch.device | None = None,
        callbacks: Sequence[Callback[Trainer]] = (),
        world: World = ALONE,
        strategy: Strategy = "time",
    ) -> None:
        self.run, self.config, self.world = run, config or run.config(), world
        self.device = resolve_device(device)
        self.callbacks = [callback for callback in callbacks if world.is_main_process or callback.everywhere]
        config, training = self.config, self.config.training
        if data.shape[0] != config.network.channels:
            raise UserError(f"network.channels={config.network.channels} but the images have {data.shape[0]} channels")
        self.shares = stage_shares(training, config.stages, config.diffusion.prior)
        self.weights = stage_weights(training, config.stages, config.diffusion.prior)
        self.counts = row_counts(training, self.shares)
        self.source = BatchSource(config, data, self.device)
        self.held_out = held_out if held_out is not None and len(held_out) else None

        double = training.precision == "fp64"
        self.gradient_sync = GradientSync(world, make_layout(strategy, config, data.shape, world.size), double=double)
        latest = self.gradient_sync.latest(run)
        torch.manual_seed(rng.fold((training.seed, "initial weights")) >> 1)
        self.denoiser = build_denoiser(config)
        # the checkpoint of step branch_at was written before branching
        if training.branch_at and (latest is None or ckpt.checkpoint_step(latest) <= training.branch_at):
            branching.tie(self.denoiser.network)
        self.gradient_sync.layout.drop(self.denoiser.network, world.rank)
        self.denoiser.to(self.device, torch.float64 if double else torch.float32)
        self.ema = EMA(self.denoiser, training.ema_halflife, training.ema_rampup)
        self.autocast = autocast_dtype(training.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.autocast == torch.float16)
        self.timer = Timer(self.device)
        self.passes = PassTimer(self.timer)
        self.execution = settled(config.execution)
        self._equip()
        # fp16 and several processes synchronise with the device in every step anyway
        late = self.device.type == "cuda" and self.gradient_sync.alone and not self.scaler.is_enabled()
        self.metrics = MetricsReporter(self.device, self._note, late=late)
        self.step, self.stopping = 0, False
        self.trial: dict[str, float] = {}  # seconds per step of each candidate, if autotuning ran
        self.ended = ""  # why training ends before its last step, see `end`
        self._judged: dict[str, Any] | None = None  # the evaluation of this step
        self.sums = MetricAccumulator(len(config.stages))
        self.warm_start: WarmStart | None = None
        if latest is not None:
            restore(self, latest)
        elif training.init_from:
            self.warm_start = warm_start(training.init_from, config)
            for module in (self.denoiser, self.ema.module):
                own = module.state_dict()
                module.load_state_dict({**own, **{n: t for n, t in self.warm_start.tensors.items() if n in own}})

    def _equip(self) -> None:
        """Create everything that depends on the set of parameters."""
        self.optimizer = make_optimizer(self.config.optimizer, self.denoiser)
        self.parts = parameters_by_part(self.denoiser.network)
        self.passes.watch(self.denoiser.network.encoders)
        self.gradient_sync.equip(self.parts, shared=branching.tied(self.denoiser.network))
        self.compute(self.execution)

    def compute(self, execution: Execution) -> None:
        """Use this execution for the following steps."""
        check_execution(execution, self.device, self.world.size)
        self.execution = execution
        self.side_by_side = ThreadParallel(execution.shards)
        execute(self.denoiser.network, execution)
        self.denoiser.graphs = Graphs(self.denoiser.network) if execution.cuda_graphs else None

    @property
    def images(self) -> int:
        """Number of training images seen so far."""
        return self.step * self.config.training.batch

    def fit(self) -> None:
        """Train to the end (or until `stop` or `end`) and save a checkpoint of the last step.

        Raises:
            TrainingDiverged: if a loss or gradient is not finite; the last good checkpoint is kept.
            OSError: if a checkpoint cannot be written; the previous one is kept.
            UserError: if another process trains the run or has trained it further.
            RankLost: if another process of the world is lost.
        """
        with ExitStack() as held:
            with self.world.synchronize_errors():
                if self.world.is_main_process:
                    held.enter_context(self.run.locked())
                    ckpt.refuse_newer(self.run.checkpoints, self.step)
                    self.run.rewind_metrics(self.step)
                    self.run.log_launch(self.device)
            for callback in self.callbacks:
                callback.started(self)
            try:
                if self.step < self.config.training.steps and not self.ended:
                    self._choose_execution()
                self._loop()
            finally:
                for callback in self.callbacks:
                    callback.finished(self)

    def _choose_execution(self) -> None:
        """Choose the fastest execution on this device: the stored result of an earlier start, or autotuning."""
        counts, weights = next(updates(self.config.training, self.step, self.counts, self.shares, self.weights))

        def passes() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with self.world.translate_errors():
                self._backward(counts, weights)

        remaining = self.config.training.steps - self.step
        size = sum(parameter.nbytes for parameter in self.denoiser.parameters())
        self.trial = choose(self.run, self.config, self.world, self.device, size, remaining, self.compute, passes)
        self.optimizer.zero_grad(set_to_none=True)
        for callback in self.callbacks:
            callback.chosen(self)

    @property
    def stopped(self) -> bool:
        """Whether a process has requested a stop, known to all processes after each step."""
        return self.stopping if self.gradient_sync.alone else self.gradient_sync.stopping

    def stop(self) -> None:
        """Stop `fit` after the current step, with a checkpoint."""
        self.stopping = True

    def end(self, reason: str) -> None:
        """End `fit` after the current step as if it were the last; if called before the first step, no step is made."""
        self.ended = reason

    def judged(self, record: dict[str, Any]) -> None:
        """Log the evaluation of this step's averaged weights; a checkpoint of the step follows.

        Args:
            record: a line for metrics.jsonl. Its "frechet" (None: not measured) is the checkpoint's quality. Its
                "seconds" are excluded from the training rate.
        """
        self._judged = record
        self._clock += record["seconds"]
        self._log(record)

    def _loop(self) -> None:
        training = self.config.training
        self._restart_clock()
        while self.step < training.steps and not self.ended:
            self._judged = None
            self._iterate()
            for callback in self.callbacks:
                callback.stepped(self)
            last = self.step == training.steps or bool(self.ended)
            if self.step % training.log_every == 0 or last:
                self._log_training()
            due = bool(training.held_out_every) and (self.step % training.held_out_every == 0 or last)
            kept = bool(training.keep_every) and self.step % training.keep_every == 0
            score = self._score_held_out(log=True) if due and self.held_out else None
            stopping = self.stopped  # read once: a later request takes effect after the next step
            if self.step % training.checkpoint_every == 0 or kept or last or stopping or self._judged is not None:
                # every checkpoint needs a score to find the best one
                if score is None and training.held_out_every and self.held_out:
                    score = self._score_held_out(log=False)
                self.save(score)
            if stopping:
                return

    # -- one iteration ------------------------------------------------------------------------------------------------

    def _branch(self) -> None:
        """Give every stage its own copy of the shared parts, including EMA weights and optimiser state."""
        moments = ckpt.optimizer_tensors(self.optimizer, self.denoiser)
        self.passes.watch(())  # otherwise the hooks would be copied
        for module in (self.denoiser, self.ema.module):
            branching.untie(module.network)
            self.gradient_sync.layout.drop(module.network, self.world.rank)
        self.ema.follow(self.denoiser)
        self._equip()
        names = (name for name, _ in self.denoiser.named_parameters())
        ckpt.restore_optimizer(self.optimizer, self.denoiser, branching.grown(moments, names))

    def _iterate(self) -> None:
        training = self.config.training
        if self.step == training.branch_at and branching.tied(self.denoiser.network):
            self._branch()
        torch.manual_seed(rng.fold(self._dropout_key()) >> 1)
        for counts, weights in updates(training, self.step, self.counts, self.shares, self.weights):
            self._optimize(counts, weights)
        with self.timer.part("average"):
            self.ema.update(training.batch, self.images)
        self.step += 1

    def _dropout_key(self) -> tuple[int | str, ...]:
        # ranks train different rows, so their dropout masks differ, too
        rank = (self.world.rank,) if self.world.rank else ()
        return (self.config.training.seed, "dropout", self.step, *rank)

    def _optimize(self, counts: tuple[int, ...], weights: tuple[float, ...]) -> None:
        optimizer = self.optimizer
        self.denoiser.train()
        optimizer.zero_grad(set_to_none=True)
        with self.world.translate_errors():
            totals = self._backward(counts, weights)
        with self.timer.part("gradients"):
            found = self._look_at_gradients(totals, counts)
        if not self.metrics.late:
            self.metrics.add(found)
        with self.timer.part("optimizer"):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.config.optimizer, self.step)
            if self.metrics.late:  # values are checked one step later: skip the update now if one is not finite
                optimizer.found_inf = found.unfit  # type: ignore[attr-defined]
            self.scaler.step(optimizer)
            self.scaler.update()
        if self.metrics.late:
            self.metrics.add(found)
        if self.scaler.is_enabled():
            refuse_scale(self.scaler.get_scale(), self.step + 1)

    def _note(self, found: StepMetrics, losses: list[float], norms: dict[str, float]) -> None:
        """Add a step's losses and gradient norms to the running sums; raise TrainingDiverged if one is not finite."""
        refuse(self.run, found.step, "loss", {f"stage {k + 1}": loss for k, loss in enumerate(losses)})
        if not self.scaler.is_enabled():  # scaled fp16 gradients may overflow: the scaler skips that step
            refuse(self.run, found.step, "gradient", norms)
        self.sums.add([x if c else None for x, c in zip(losses, found.counts, strict=True)], norms)

    def _look_at_gradients(self, totals: Tensor, counts: tuple[int, ...]) -> StepMetrics:
        """Unscale and clip gradients; return the mean losses of the stages and the gradient norms of the parts."""
        if self.scaler.is_enabled():
            self.gradient_sync.sync_overflow([p.grad for p in self.denoiser.parameters() if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        names = list(self.denoiser.network.parts())
        totals, norms = self.gradient_sync.reduce_metrics(totals, part_norms(self.parts), names, stopping=self.stopping)
        clip(self.config.optimizer, self.parts, norms)
        losses = [total / max(c, 1) for total, c in zip(totals, counts, strict=True)]
        values = torch.cat([torch.stack(losses), torch.stack(list(norms.values()))])
        return StepMetrics(self.step + 1, counts, tuple(norms), values)

    def _backward(self, counts: tuple[int, ...], weights: tuple[float, ...]) -> Tensor:
        """Accumulate gradients, sum them over processes; return the summed loss of each stage on this process."""
        rows = self.gradient_sync.rows(counts)
        parts = min(self.config.training.accumulate, max(map(len, rows)))
        totals = torch.zeros(len(counts), device=self.device)
        if not parts:
            self.gradient_sync.expect(counts)
        for part in range(parts):
            with self.timer.part("data"):
                batch = self.source.draw(self.step, counts, rows, part, parts)
            if self.execution.shards > 1:
                shards, key = batch.shards(self.execution.shards), (*self._dropout_key(), *counts, part)
                forward = partial(self._forward, counts=counts, weights=weights)
                totals += backward(self.side_by_side, shards, self.parts, forward, self.passes, key)
                continue
            sums, loss = self._forward(batch, counts, weights)
            if part == parts - 1:
                self.gradient_sync.expect(counts)
            with self.passes.backward():
                loss.backward()  # type: ignore[no-untyped-call]
            totals += sums
        with self.timer.part("gradients"):
            self.gradient_sync.sum_gradients()
        return totals

    def _forward(self, batch: Batch, counts: tuple[int, ...], weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
        """Return the summed loss of each stage (detached) and the scaled objective for the backward pass."""
        autocast = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
        with self.passes.forward(), autocast:
            sums = stage_losses(self.denoiser, batch)
        return torch.stack(sums).detach(), self.scaler.scale(objective(sums, weights, counts))

    # -- logging and checkpoints --------------------------------------------------------------------------------------

    def _log_training(self) -> None:
        self.metrics.settle()
        seconds = time.perf_counter() - self._clock
        images = self.images - self._clock_images
        losses, norms = self.sums.means()
        record = {
            "kind": "train",
            "step": self.step,
            "images": self.images,
            "loss": losses,
            "grad_norm": norms,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": images / max(seconds, 1e-9),
            "seconds": seconds,
        }
        self.sums.clear()
        self._restart_clock()
        self._log(record)

    def _restart_clock(self) -> None:
        self._clock, self._clock_images = time.perf_counter(), self.images

    @torch.no_grad()
    def held_out_losses(self) -> list[float]:
        """Return the mean loss of each stage on held-out rows with the averaged weights (fixed images and noise)."""
        assert self.held_out is not None
        count = self.config.training.held_out_rows
        totals = torch.zeros(len(self.shares), dtype=torch.float64, device=self.device)
        for stage in range(len(self.shares)):
            rows = self.gradient_sync.rows([count] * len(self.shares))[stage]
            if rows:
                batch = held_out_batch(self.config, self.held_out, stage, self.device).part(rows)
                totals[stage] = stage_losses(self.ema.module, batch)[stage]
        return [total / count for total in self.world.all_reduce(totals).tolist()]

    def averaged(self) -> MultiStageDenoiser:
        """Return the whole network with averaged weights, for immediate use; all processes call it."""
        dtype = next(self.ema.module.parameters()).dtype
        return self.gradient_sync.gather_model(
            self.ema.module, lambda: build_denoiser(self.config).to(self.device, dtype)
        )

    def _score_held_out(self, *, log: bool) -> float | None:
        """Return the objective on held-out rows; None if it is not finite."""
        start = time.perf_counter()
        losses = self.held_out_losses()
        seconds = time.perf_counter() - start
        self._clock += seconds  # excluded from the training rate
        if log:
            known = [x if math.isfinite(x) else None for x in losses]  # JSON has no NaN
            self._log({"kind": "held_out", "step": self.step, "images": self.images, "loss": known, "seconds": seconds})
        score = sum(w * x for w, x in zip(self.weights, losses, strict=True))
        return score if math.isfinite(score) else None

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.is_main_process:
            self.run.log(record)
        for callback in self.callbacks:
            callback.logged(self, record)

    def save(self, score: float | None = None) -> None:
        """Write a checkpoint of this step and prune the older ones."""
        self.metrics.settle()
        training, quality = self.config.training, None if self._judged is None else self._judged["frechet"]
        checkpoint = snapshot(self, score=score, quality=quality)
        with self.world.synchronize_errors():
            if self.world.is_main_process:
                ckpt.save_checkpoint(self.run.checkpoints, checkpoint)
                ckpt.prune(self.run.checkpoints, training.keep_last, training.keep_every)
