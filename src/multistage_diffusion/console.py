"""Progress and messages on standard error: a bar with rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .distributed import is_main_process
from .escaping import shown
from .reporting.describe import training_table
from .training.callbacks import Callback
from .training.trainer import Trainer

RECENT = 60.0  # seconds over which a rate is taken


class PlainConsole(Console):
    """A console that prints text literally, because file and class names may hold rich markup or control characters."""

    def print(self, *objects: Any, **options: Any) -> None:
        """Print text with control characters escaped."""
        super().print(*(shown(o, lines=True) if isinstance(o, str) else o for o in objects), **options)


console = PlainConsole(
    stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True, quiet=not is_main_process()
)


class Bar:
    """Progress of one long task; callable with (done, total).

    Args:
        title: name of the task.
        unit: what is counted.
        every: seconds between plain lines where there is no terminal.
    """

    def __init__(self, title: str, unit: str = "", every: float = 10.0) -> None:
        self.title, self.unit, self.every = title, unit, every
        self.note = ""
        self.later = 0.0  # seconds of other work that the time left includes
        self.without = ""  # other work that it does not include
        self._text = ""
        self._marks = deque[tuple[float, int]]()  # of the last minute: time without other work, and the count done
        self._other = 0.0  # seconds of other work
        self._paused: float | None = None  # when other work began
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
        """Show progress, with the rate of the last minute."""
        now = time.monotonic()
        if self._paused is not None:
            self._other += now - self._paused
            self._paused = None
        at = now - self._other
        if self._marks and done < self._marks[-1][1]:  # another part of the work begins
            self._marks.clear()
        while len(self._marks) > 1 and self._marks[1][0] < at - RECENT:
            self._marks.popleft()
        if not self._marks or at - self._marks[-1][0] >= RECENT / 100:
            self._marks.append((at, done))
        since, first = self._marks[0]
        rate = (done - first) / max(at - since, 1e-9)
        speed = f"{rate:.{1 if rate >= 1 else 3}f} {self.unit}/s" if self.unit and rate else ""
        left = f"{duration((total - done) / rate + self.later)} left" if rate else ""
        left += f" without {self.without}" if left and self.without and done < total else ""
        self._text = ", ".join(part for part in (f"{done}/{total}", speed, left, self.note) if part)
        if self._bar:
            self._bar.start()  # at the first call: only one bar can be shown at a time, and some are never called
            self._bar.update(self._task, completed=done, total=total, text=self._text)
            if done >= total:
                self._bar.stop()
        else:
            self._line(self._text)

    def meanwhile(self, what: str, done: int, total: int) -> None:
        """Show how far other work has come, whose time counts for neither rate nor time left."""
        if self._paused is None:
            self._paused = time.monotonic()
        share = f" {done / total:.0%}" if total else ""
        if self._bar:
            self._bar.start()
            self._bar.update(self._task, text=f"{what}{share} ({self._text})")
        elif time.monotonic() - self._paused >= self.every:  # what takes less needs no line of its own
            self._line(f"{self._text.partition(',')[0]}, {what}{share}")

    def _line(self, text: str) -> None:
        """Print a plain line, unless the last one is too recent."""
        now = time.monotonic()
        if now - self._last >= self.every:
            self._last = now
            console.print(f"{self.title}: {text}")


def duration(seconds: float) -> str:
    """Return a duration as text, such as "5 min"."""
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = round(minutes / 60)
    return f"{hours} h" if hours < 72 else f"{round(hours / 24)} days"


class TrainingProgress(Callback[Trainer]):
    """Shows steps, rate, time left and the latest losses during training; `with` removes the bar after an error."""

    def __init__(self) -> None:
        self._bar = Bar("training", "steps")
        self._evaluations: list[float] = []  # seconds that each has taken

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.__exit__()

    def started(self, trainer: Trainer) -> None:
        """Print what will be trained, unless training has already ended."""
        if trainer.ended:
            return
        config = trainer.config
        if trainer.step >= config.training.steps:
            console.print(
                f"{config.name} is already at step {trainer.step}, its last; --set training.steps=N trains further"
            )
            return
        widths = "/".join(map(str, config.network.decoder_widths))
        rows = f"rows per stage {'/'.join(map(str, trainer.allocation.counts))}"
        if config.training.update_mode == "one-stage":
            rows = f"{config.training.batch} rows of one stage per step"
        console.print(
            f"training {config.name} on {trainer.device}: steps {trainer.step} to {config.training.steps}, encoder "
            f"{config.network.encoder_width}, decoders {widths}, {rows}"
        )
        if len(config.stages) > 1:
            console.print(training_table(config))
        if trainer.warm_start is not None:
            start = trainer.warm_start
            fresh = f"; random: {', '.join(start.fresh)}" if start.fresh else ""
            resized = f"; of another width: {', '.join(start.resized)}" if start.resized else ""
            console.print(
                f"initial weights from {config.training.init_from}: {', '.join(start.cloned)}{resized}{fresh}"
            )
        self._evaluations = [r["seconds"] for r in trainer.run.records() if r["kind"] == "quality"]
        self._count_evaluations(trainer)
        self._bar.__enter__()
        self._bar(trainer.step, config.training.steps)

    def _count_evaluations(self, trainer: Trainer) -> None:
        """Add to the time left what the evaluations to come take, if one has shown how long that is."""
        steps, every = trainer.config.training.steps, trainer.config.evaluation.every
        to_come = len({*range(every, steps, every), steps} - set(range(trainer.step + 1))) if every else 0
        known = self._evaluations
        self._bar.later = to_come * sum(known) / len(known) if known else 0.0
        self._bar.without = "evaluations" if to_come and not known else ""

    def chosen(self, trainer: Trainer) -> None:
        """Print the execution settings that autotuning chose and the step times it measured."""
        if trainer.autotuned:
            seconds = ", ".join(f"{words} {found:.3g} s" for words, found in trainer.autotuned.items())
            words = trainer.passes.execution.words()
            console.print(f"execution: {words} (a step took: {seconds}); stored in execution.json")

    def stepped(self, trainer: Trainer) -> None:
        """Update the bar."""
        self._bar(trainer.step, trainer.config.training.steps)

    def busy(self, trainer: Trainer, what: str, done: int, total: int) -> None:
        """Show the work between two steps in the bar."""
        self._bar.meanwhile(what, done, total)

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Show the latest losses beside the bar; print one line per evaluation."""
        if record["kind"] == "quality":
            distance = "not measured" if record["frechet"] is None else f"{record['frechet']:.4g}"
            console.print(
                f"step {record['step']}: Fréchet distance {distance} ({record['extractor']}, {record['count']} samples, "
                f"{record['petaflops']:.3g} PFLOPs)"
            )
            self._evaluations.append(record["seconds"])
            self._count_evaluations(trainer)
            return
        losses = " ".join("-" if x is None else f"{x:.4f}" for x in record["loss"])
        self._bar.note = f"{'held-out loss' if record['kind'] == 'held_out' else 'loss'} per stage {losses}"

    def finished(self, trainer: Trainer) -> None:
        """Remove the bar, and print why training ended early, if it did."""
        self._bar.__exit__()
        if trainer.ended:
            console.print(trainer.ended)
