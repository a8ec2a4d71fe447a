"""Progress and messages: a bar with rate and time left on a terminal, plain lines elsewhere; all on standard error."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .training.trainer import Callback, Trainer

console = Console(stderr=True, highlight=False, soft_wrap=True)


class Bar:
    """Progress of one long piece of work; callable with (done, total).

    Args:
        title: what is being done.
        unit: what is counted.
        every: seconds between plain lines where there is no terminal.
    """

    def __init__(self, title: str, unit: str = "", every: float = 10.0) -> None:
        self.title, self.unit, self.every = title, unit, every
        self.note = ""
        self._start: tuple[float, int] | None = None  # when the first news came, and how much was done then
        self._last = time.monotonic()
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=None, rate="", note="")

    def __enter__(self) -> Bar:
        self._last = time.monotonic()
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, total: int) -> None:
        """Show progress."""
        now = time.monotonic()
        if self._start is None:
            self._start = now, done
        since, first = self._start
        rate = (done - first) / max(now - since, 1e-9)
        speed = f"{rate:.1f} {self.unit}/s" if self.unit and rate else ""
        if self._bar:
            self._bar.update(self._task, completed=done, total=total, rate=speed, note=self.note)
        elif now - self._last >= self.every:
            self._last = now
            left = f"{(total - done) / rate:.0f} s left" if rate else ""
            parts = [f"{self.title}: {done}/{total}", speed, left, self.note]
            console.print(", ".join(p for p in parts if p))


class TrainingProgress(Callback):
    """Shows steps, rate, time left and the latest losses while a run trains; `with` takes the bar away after an error."""

    def __init__(self) -> None:
        self._bar = Bar("training", "steps")

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def started(self, trainer: Trainer) -> None:
        """Say what is going to happen."""
        config = trainer.config
        widths = "/".join(map(str, config.network.decoder_widths))
        console.print(
            f"training {config.name} on {trainer.device}: steps {trainer.step} to {config.training.steps}, encoder "
            f"{config.network.encoder_width}, decoders {widths}, rows per stage {'/'.join(map(str, trainer.counts))}"
        )
        self._bar.__enter__()
        self._bar(trainer.step, config.training.steps)

    def stepped(self, trainer: Trainer) -> None:
        """Move the bar."""
        self._bar(trainer.step, trainer.config.training.steps)

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Keep the latest losses beside the bar."""
        losses = " ".join("-" if x is None else f"{x:.4f}" for x in record["loss"])
        self._bar.note = f"{'held-out' if record['kind'] == 'held_out' else 'loss'} {losses}"

    def finished(self, trainer: Trainer) -> None:
        """Take the bar away."""
        self._bar.__exit__()
