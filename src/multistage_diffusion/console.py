"""Progress and messages: a bar with rate and time left on a terminal, plain lines elsewhere; all on standard error."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .distributed import is_main_process
from .shown import shown
from .training.callbacks import Callback
from .training.trainer import Trainer


class PlainConsole(Console):
    """A console for which text is text: names of files and classes may hold what rich reads as markup, or control characters."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print text, safe to show."""
        super().print(*(shown(o, lines=True) if isinstance(o, str) else o for o in objects), **options)


console = PlainConsole(
    stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=not is_main_process()
)


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
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=12),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=None, text="")

    def __enter__(self) -> Bar:
        self._last = time.monotonic()
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
        speed = f"{rate:.{1 if rate >= 1 else 3}f} {self.unit}/s" if self.unit and rate else ""
        left = f"{duration((total - done) / rate)} left" if rate else ""
        text = ", ".join(part for part in (f"{done}/{total}", speed, left, self.note) if part)
        if self._bar:
            self._bar.start()  # at the first news: a bar that has none never shows, and only one can be shown at once
            self._bar.update(self._task, completed=done, total=total, text=text)
            if done >= total:
                self._bar.stop()
        elif now - self._last >= self.every:
            self._last = now
            console.print(f"{self.title}: {text}")


def duration(seconds: float) -> str:
    """Return a time in words."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 72 else f"{round(hours / 24)} days"


class TrainingProgress(Callback):
    """Shows steps, rate, time left and the latest losses while a run trains; `with` takes the bar away after an error."""

    def __init__(self) -> None:
        self._bar = Bar("training", "steps")

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def started(self, trainer: Trainer) -> None:
        """Say what is going to happen, unless nothing is."""
        if trainer.ended:
            return
        config = trainer.config
        widths = "/".join(map(str, config.network.decoder_widths))
        rows = f"rows per stage {'/'.join(map(str, trainer.counts))}"
        if config.training.update_mode == "one-stage":
            rows = f"{config.training.batch} rows of one stage per step"
        console.print(
            f"training {config.name} on {trainer.device}: steps {trainer.step} to {config.training.steps}, encoder "
            f"{config.network.encoder_width}, decoders {widths}, {rows}"
        )
        if trainer.warm_start is not None:
            start = trainer.warm_start
            fresh = f"; from scratch: {', '.join(start.fresh)}" if start.fresh else ""
            console.print(f"cloned from {config.training.init_from}: {', '.join(start.cloned)}{fresh}")
        self._bar.__enter__()
        self._bar(trainer.step, config.training.steps)

    def chosen(self, trainer: Trainer) -> None:
        """Tell of a trial."""
        if trainer.trial:
            seconds = ", ".join(f"{words} {found:.3g} s" for words, found in trainer.trial.items())
            console.print(
                f"computed {trainer.execution.words()} (a step took: {seconds}); see execution.json in the run"
            )

    def stepped(self, trainer: Trainer) -> None:
        """Move the bar."""
        self._bar(trainer.step, trainer.config.training.steps)

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Keep the latest losses beside the bar; tell of an evaluation in a line."""
        if record["kind"] == "quality":
            distance = "unknown" if record["frechet"] is None else f"{record['frechet']:.4g}"
            console.print(
                f"step {record['step']}: Fréchet distance {distance} ({record['extractor']}, {record['count']} samples, "
                f"{record['petaflops']:.3g} PFLOPs)"
            )
            return
        losses = " ".join("-" if x is None else f"{x:.4f}" for x in record["loss"])
        self._bar.note = f"{'held-out' if record['kind'] == 'held_out' else 'loss'} {losses}"

    def finished(self, trainer: Trainer) -> None:
        """Take the bar away, and say why training has ended early."""
        self._bar.__exit__()
        if trainer.ended:
            console.print(trainer.ended)
