"""The trainer: trains one run from the start or its latest checkpoint to the end."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch

from .. import rng
from ..config import RunConfig
from ..denoisers import MultiStageDenoiser, build_denoiser
from ..distributed import ALONE, World
from ..errors import UserError
from ..performance.devices import resolve_device
from ..performance.execution import settled
from . import branching
from . import checkpoint as ckpt
from .batches import BatchSource, TrainingData
from .callbacks import Callback, Evaluated, StepAbandoned, StopRequested, between_steps
from .ema import EMA, PowerEMA
from .losses import StageAllocation
from .metrics import TrainingLog, refuse_scale
from .optimizer import Optimization
from .passes import Passes, dropout_key
from .state import latest_checkpoint, restore, save_profiles, snapshot
from .strategies import make_strategy

if TYPE_CHECKING:
    from .run import Run
    from .warm_start import WarmStart


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
        strategy: what each process holds, see strategies/.

    Attributes:
        allocation: shares, weights and rows of the stages.
        denoiser: the network in training, as far as this process holds it.
        ema: the averaged network, as far as this process holds it.
        ties: keep narrower decoders slices of the widest until branching.
        profiles: the averages of training.ema_profiles, likewise.
        passes: computes gradients.
        optimization: updates the weights.
        log: losses, norms and rate since the last line of the log.
        step: iterations done.
        kept: the step with which a process would go on: that of the latest checkpoint, 0 without one.
        stopping: whether this process has requested a stop.
        ended: why training ends before its last step; "": it does not.
        autotuned: seconds per step of each candidate, if autotuning ran.
        warm_start: what the weights started from, if a trained run.

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
        strategy: str = "time",
    ) -> None:
        self.run, self.config, self.world = run, config or run.config(), world
        self.device = resolve_device(device)
        self.callbacks = [callback for callback in callbacks if world.is_main_process or callback.everywhere]
        config, training = self.config, self.config.training
        if data.shape[0] != config.network.channels:
            raise UserError(f"network.channels={config.network.channels} but the images have {data.shape[0]} channels")
        self.allocation = StageAllocation.of(config)
        source = BatchSource(config, data, self.device)
        self.held_out = held_out if held_out is not None and len(held_out) else None
        self.strategy = make_strategy(strategy, config, data.shape, world)
        self.step, self.stopping, self.ended = 0, False, ""
        self.autotuned: dict[str, float] = {}
        self.warm_start: WarmStart | None = None

        latest = latest_checkpoint(run.checkpoints, world)
        # the checkpoint of step branch_at was written before branching
        shared = training.branch_at > 0 and (latest is None or ckpt.checkpoint_step(latest) <= training.branch_at)
        torch.manual_seed(rng.fold((training.seed, "initial weights")) >> 1)
        self.denoiser, average = self._new_denoiser(shared=shared), self._new_denoiser(shared=shared)
        self.optimization = Optimization.of(config, self.denoiser.network, self.device, strategy)
        average.load_state_dict(self.denoiser.state_dict())
        self.ema = EMA(self.denoiser, training.ema_halflife, training.ema_rampup, average)
        self.profiles = [
            PowerEMA(self.denoiser, sigma_rel, self._new_denoiser(shared=shared)) for sigma_rel in training.ema_profiles
        ]
        self._averages: list[EMA[MultiStageDenoiser]] = [self.ema, *self.profiles]
        self.passes = Passes(config, self.denoiser, source, self.strategy, self.optimization)
        self.passes.compute(settled(config.execution))
        self._watch()
        # fp16 and several processes synchronise with the device in every step anyway
        scaling = self.optimization.scaler.is_enabled()
        late = self.device.type == "cuda" and world.size == 1 and not scaling
        self.log = TrainingLog(run, self.device, len(config.stages), late=late, scaled=scaling)
        if latest is not None:
            restore(self, latest)
        elif training.init_from:
            self._start_from(training.init_from)
        self.kept = self.step

    def _new_denoiser(self, *, shared: bool) -> MultiStageDenoiser:
        """Build a network, as far as this process holds it.

        Args:
            shared: whether all stages share one decoder or slices of it.
        """
        denoiser = build_denoiser(self.config)
        if shared:
            branching.tie(denoiser.network)
        if self.config.training.freeze == "encoder":
            denoiser.network.encoders.requires_grad_(False)
        double = self.config.training.precision == "fp64"
        self.strategy.place(denoiser.network, self.device, torch.float64 if double else torch.float32)
        return denoiser

    def _start_from(self, path: str) -> None:
        from .warm_start import warm_start

        self.warm_start = warm_start(path, self.config)
        for module in (self.denoiser, self.ema.module):
            self.warm_start.give(module, self.strategy.local)
            self._ties_of(module).copy_weights()
        if self.optimization.sharing is not None:
            self.optimization.sharing.take_decoders()
            self.ema.module.load_state_dict(self.denoiser.state_dict())

    def _watch(self) -> None:
        """Follow the parameters of the network; called again after branching."""
        self.optimization.watch(self.denoiser.network)
        self.strategy.watch(self.optimization.parts, shared=self.denoiser.network.tied)
        self.passes.watch()
        self.ties = self._ties_of(self.denoiser)

    def _ties_of(self, denoiser: MultiStageDenoiser) -> branching.Ties:
        return branching.Ties(denoiser.network, self.strategy.whole, self.strategy.local)

    @property
    def images(self) -> int:
        """Number of training images seen so far."""
        return self.step * self.config.training.batch

    @property
    def stopped(self) -> bool:
        """Whether a process has requested a stop, known to all processes after each step."""
        return self.stopping if self.world.size == 1 else self.strategy.stop_requested

    def stop(self) -> None:
        """Stop `fit` after the current step, with a checkpoint."""
        self.stopping = True

    def interrupt(self) -> None:
        """Stop, for a handler of signals: passes that may be compiled, which takes minutes, are given up if nothing is lost.

        Raises:
            StepAbandoned: in such passes, which the calling thread computes; `fit` catches it.
        """
        self.stop()
        self.passes.abandon()

    def fit(self) -> None:
        """Train to the end (until `stop`, or until a callback ends it) and save a checkpoint of the last step.

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
                    ckpt.drop_newer(self.run.snapshots, self.step)
                    self.run.log_launch(self.device)
            for callback in self.callbacks:
                self.ended = callback.started(self) or self.ended
            try:
                if self.step < self.config.training.steps and not self.ended:
                    self._autotune()
                self._make_up()
                self._loop()
            finally:
                for callback in self.callbacks:
                    callback.finished(self)

    def _autotune(self) -> None:
        """Choose the fastest execution on this device: the stored result of an earlier start, or autotuning."""
        from ..performance.autotune import choose

        counts, weights = next(self.allocation.updates(self.step))
        told = between_steps(self, "trying executions")

        def passes() -> None:
            told(0, 0)
            self.optimization.zero_grad()
            with self.world.translate_errors(), self.passes.abandonable(True):
                self.passes.gradients(self.step, counts, weights)

        remaining = self.config.training.steps - self.step
        size = sum(parameter.nbytes for parameter in self.denoiser.parameters())
        compute = self.passes.compute
        try:
            self.autotuned = choose(self.run, self.config, self.world, self.device, size, remaining, compute, passes)
        except (StopRequested, StepAbandoned):  # one step follows, so that there is a checkpoint
            self.optimization.zero_grad()
            return
        self.optimization.zero_grad()
        for callback in self.callbacks:
            callback.chosen(self)

    def _make_up(self) -> None:
        """Evaluate and score what a stop at this step came before, so that a resumed run records what any other does."""
        saved = latest_checkpoint(self.run.checkpoints, self.world)
        if not self.step or saved is None or ckpt.checkpoint_step(saved) != self.step:
            return
        evaluated = self._taken(callback.resumed(self) for callback in self.callbacks)
        score = self._score_held_out(log=True) if self._owes_score() else None
        if evaluated is not None or score is not None:
            state = ckpt.read_state(saved)
            quality = state.get("quality") if evaluated is None else evaluated.quality
            self.save(state.get("score") if score is None else score, quality)

    def _owes_score(self) -> bool:
        """Return whether a held-out loss is due at this step that has not been logged."""
        every = self.config.training.held_out_every
        due = bool(every) and (self.step % every == 0 or self.step == self.config.training.steps)
        if not (due and self.held_out):
            return False
        logged = any(record["kind"] == "held_out" and record["step"] == self.step for record in self.run.records())
        return not self.world.broadcast_object(logged)

    def _loop(self) -> None:
        training = self.config.training
        self.log.restart(self.images)
        self._prefetch(self.step)
        while self.step < training.steps and not self.ended:
            try:
                self._iterate()
            except StepAbandoned:
                if self.step != self.kept:
                    self.save()
                return
            if self.profiles and self.step % training.ema_snapshot_every == 0:
                self.log.reporter.settle()
                save_profiles(self)
            evaluated = self._taken(callback.stepped(self) for callback in self.callbacks)
            last = self.step == training.steps or bool(self.ended)
            if self.step % training.log_every == 0 or last:
                self._log(self.log.record(self.step, self.images, self.optimization.lr))
            due = bool(training.held_out_every) and (self.step % training.held_out_every == 0 or last)
            kept = bool(training.keep_every) and self.step % training.keep_every == 0
            score = self._score_held_out(log=True) if due and self.held_out and not self.stopped else None
            stopping = self.stopped  # read once: a later request takes effect after the next step
            if self.step % training.checkpoint_every == 0 or kept or last or stopping or evaluated is not None:
                # every checkpoint needs a score to find the best one, but a stop does not wait for it
                if score is None and training.held_out_every and self.held_out and not stopping:
                    score = self._score_held_out(log=False)
                self.save(score, None if evaluated is None else evaluated.quality)
            if stopping:
                return

    def _taken(self, answers: Iterable[Evaluated | None]) -> Evaluated | None:
        """Log the evaluation among the answers of the callbacks, if there is one, and return it."""
        found = None
        for found in filter(None, answers):
            self.ended = found.stop_reason or self.ended
            self.log.exclude(found.record["seconds"])
            self._log(found.record)
        return found

    # -- one iteration ------------------------------------------------------------------------------------------------

    def _iterate(self) -> None:
        training = self.config.training
        untouched = self.step != training.branch_at or not self.denoiser.network.tied
        if not untouched:
            if self.passes.execution.compile and self.kept != self.step:
                self.save()  # a stop can give up this step, too
            self._branch()
        self._prefetch(self.step + 1)
        torch.manual_seed(rng.fold(dropout_key(training.seed, self.step, self.world.rank)) >> 1)
        for counts, weights in self.allocation.updates(self.step):
            self._optimize(counts, weights, abandonable=untouched or self.kept == self.step)
            untouched = False
        with self.passes.timer.part("average"):
            for average in self._averages:
                average.update(training.batch, self.images)
        self.step += 1

    def _prefetch(self, step: int) -> None:
        """Begin to read the rows of a step while the one before is computed."""
        if step < self.config.training.steps:
            self.passes.prefetch(step, self.allocation.updates(step))

    def _branch(self) -> None:
        """Give every stage its own copy of the shared parts, including averaged weights and optimiser state."""
        states = self.ties.states(self.optimization.optimizer, self.denoiser)
        branching.untie(self.denoiser, self._averages, lambda: self._new_denoiser(shared=False).network)
        self.passes.compute(self.passes.execution)
        self._watch()
        branching.load_states(self.optimization.optimizer, self.denoiser, states)

    def _optimize(self, counts: tuple[int, ...], weights: tuple[float, ...], *, abandonable: bool) -> None:
        """Make one step of the optimiser on rows of these counts."""
        late, timer, optimization = self.log.reporter.late, self.passes.timer, self.optimization
        self.denoiser.train()
        optimization.zero_grad()
        with self.world.translate_errors():
            with self.passes.abandonable(abandonable):
                totals = self.passes.gradients(self.step, counts, weights)
            with timer.part("gradients"):
                self.ties.add_gradients()
                found = self.passes.clip(self.step, counts, totals, stopping=self.stopping)
        if not late:
            self.log.reporter.add(found)
        with timer.part("optimizer"), self.world.translate_errors():
            # values that are reported late are checked late: skip the update now if one is not finite
            optimization.update(self.step, skip=found.unfit if late else None)
            self.ties.copy_weights()
        if late:
            self.log.reporter.add(found)
        if optimization.scaler.is_enabled():
            refuse_scale(optimization.scaler.get_scale(), self.step + 1)

    # -- held-out losses, logging and checkpoints ---------------------------------------------------------------------

    def held_out_losses(self) -> list[float]:
        """Return the mean loss of each stage on held-out rows with the averaged weights (fixed images and noise).

        Raises:
            StopRequested: if a single process is to stop meanwhile.
        """
        assert self.held_out is not None
        return self.passes.held_out_losses(self.ema.module, self.held_out, between_steps(self, "scoring"))

    def averaged(self) -> MultiStageDenoiser:
        """Return the whole network with averaged weights, for immediate use; all processes call it."""
        dtype = next(self.ema.module.parameters()).dtype
        return self.strategy.gather_model(self.ema.module, lambda: build_denoiser(self.config).to(self.device, dtype))

    def _score_held_out(self, *, log: bool) -> float | None:
        """Return the objective on held-out rows; None if it is not finite, or a stop came meanwhile."""
        start = time.perf_counter()
        try:
            losses = self.held_out_losses()
        except StopRequested:
            return None
        seconds = time.perf_counter() - start
        self.log.exclude(seconds)
        if log:
            known = [x if math.isfinite(x) else None for x in losses]  # JSON has no NaN
            self._log({"kind": "held_out", "step": self.step, "images": self.images, "loss": known, "seconds": seconds})
        score = sum(w * x for w, x in zip(self.allocation.weights, losses, strict=True))
        return score if math.isfinite(score) else None

    def _log(self, record: dict[str, Any]) -> None:
        if self.world.is_main_process:
            self.run.log(record)
        for callback in self.callbacks:
            callback.logged(self, record)

    def save(self, score: float | None = None, quality: float | None = None) -> None:
        """Write a checkpoint of this step and prune the older ones.

        Args:
            score: objective on held-out rows, if known.
            quality: Fréchet distance of the step's samples, if known.
        """
        self.log.reporter.settle()
        training = self.config.training
        checkpoint = snapshot(self, score=score, quality=quality)
        with self.world.synchronize_errors():
            if self.world.is_main_process:
                ckpt.save_checkpoint(self.run.checkpoints, checkpoint)
                ckpt.prune(self.run.checkpoints, training.keep_last, training.keep_every)
        self.kept = self.step
