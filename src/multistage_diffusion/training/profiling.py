"""Profile of a run: the time of each part of a step, the rate relative to the roofline, and a trace."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from ..files import write_json
from ..performance.devices import clock, peak_memory
from ..performance.execution import Execution
from ..performance.roofline import Roofline, measure_roofline
from .callbacks import Callback
from .flops import flops_per_image
from .trainer import Trainer

SKIPPED = 3  # first steps, which reserve memory and select kernels
TIMED = 10
TRACED = 2  # steps under the profiler, which slows them down


@dataclass(frozen=True, kw_only=True)
class StepProfile:
    """Time of a step and its parts.

    Attributes:
        seconds: mean time of a step.
        parts: seconds of each part; time outside all parts is not included. With CUDA graphs the network is measured as
            a whole, so all of its time counts as "decoders". With thread_parallel, the passes are those of the
            first thread.
        execution: the execution of the steps.
        images_per_s: of this process.
        rate: floating-point operations per second (flops_per_image).
        roofline: of this device for this network.
        memory: peak memory in bytes.
        steps: number of timed steps.
    """

    seconds: float
    parts: dict[str, float]
    execution: Execution
    images_per_s: float
    rate: float
    roofline: Roofline
    memory: int
    steps: int

    def table(self) -> str:
        """Return the profile as lines for a terminal."""
        lines = [
            f"step {self.seconds:.4f} s, {self.images_per_s:.1f} images/s, {self.memory / 2**20:.0f} MiB in use at most, "
            f"computed {self.execution.words()}"
        ]
        rest = self.seconds - sum(self.parts.values())
        parts = dict(self.parts)
        if self.execution.cuda_graphs:
            parts = {"data": parts.pop("data"), "network": parts.pop("encoder") + parts.pop("decoders"), **parts}
        for name, seconds in [*parts.items(), ("rest", rest)]:
            lines.append(f"  {name:<10}{seconds:9.4f} s{seconds / self.seconds:8.1%}")
        c = self.roofline.convolution
        where = "channels-last" if self.roofline.channels_last else "contiguous"
        lines.append(
            f"  {self.rate / 1e9:.1f} GFLOP/s, {self.rate / self.roofline.convolution_rate:.0%} of the largest convolution's "
            f"{self.roofline.convolution_rate / 1e9:.1f} ({c.channels_in} to {c.channels_out}, {c.kernel}x{c.kernel}, {c.rows} x "
            f"{c.height} x {c.width}, {where}), {self.rate / self.roofline.matrix_rate:.0%} of a matrix product's "
            f"{self.roofline.matrix_rate / 1e9:.1f}"
        )
        return "\n".join(lines)


def require_profile_place(run: Path) -> None:
    """See that RUN/profile can be written.

    Raises:
        UserError: if something other than a folder is there.
    """
    folder = run / "profile"
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: is no folder, where a profile belongs; remove it")


class Profile(Callback[Trainer]):
    """Profiles some steps of a run and writes RUN/profile/parts.json and RUN/profile/trace.json.

    The run continues afterwards.

    Args:
        report: called with the table.
        skipped, timed, traced: numbers of steps.

    Attributes:
        result: the profile; None until the timed steps are done.
    """

    def __init__(
        self,
        report: Callable[[str], object] | None = None,
        *,
        skipped: int = SKIPPED,
        timed: int = TIMED,
        traced: int = TRACED,
    ) -> None:
        self.report, self.skipped, self.timed, self.traced = report, skipped, timed, traced
        self.result: StepProfile | None = None
        self._done = 0
        self._profiler: Any = None

    def stepped(self, trainer: Trainer) -> None:
        """Count a step; start the timing, finish it and start the trace, or finish the trace."""
        self._done += 1
        if self._done == self.skipped:
            trainer.passes.timer.running = True
            trainer.passes.timer.seconds()
            self._start = clock(trainer.device)
        elif self._done == self.skipped + self.timed:
            self._finish(trainer)
            activities = [torch.profiler.ProfilerActivity.CPU]
            if trainer.device.type == "cuda":
                activities.append(torch.profiler.ProfilerActivity.CUDA)
            every = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)  # thread_parallel
            self._profiler = torch.profiler.profile(activities=activities, experimental_config=every)
            self._profiler.start()
        elif self._done == self.skipped + self.timed + self.traced:
            self._profiler.stop()
            trainer.passes.timer.running = False
            trainer.passes.timer.seconds()
            self._profiler.export_chrome_trace(str(trainer.run.path / "profile" / "trace.json"))
            self._profiler = None

    def finished(self, trainer: Trainer) -> None:
        """Stop the profiler and the timer if the run ends early."""
        if self._profiler is not None:
            self._profiler.stop()
        trainer.passes.timer.running = False

    def _finish(self, trainer: Trainer) -> None:
        seconds = (clock(trainer.device) - self._start) / self.timed
        parts = {name: value / self.timed for name, value in trainer.passes.timer.seconds().items()}
        config, shape = trainer.config, trainer.passes.source.shape
        rows = sum(map(len, trainer.strategy.rows(trainer.allocation.counts)))
        dtype = trainer.passes.autocast or next(trainer.denoiser.parameters()).dtype
        images = rows if config.training.update_mode != "sequential" else config.training.batch
        self.result = StepProfile(
            seconds=seconds,
            parts=parts,
            execution=trainer.passes.execution,
            images_per_s=images / seconds,
            rate=flops_per_image(config) * images / seconds,
            roofline=measure_roofline(config.network, shape, trainer.allocation.counts, trainer.device, dtype),
            memory=peak_memory(trainer.device),
            steps=self.timed,
        )
        write_json(trainer.run.path / "profile" / "parts.json", self.result)
        if self.report is not None:
            self.report(self.result.table())
