"""msdiff quickstart: from a folder of images to samples and a report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional

from ..config.serialization import to_dict
from ..console import Bar, TrainingProgress, console
from ..data.sources import require_source, to_path
from ..errors import UserError
from ..evaluation import EvaluationResult
from ..evaluation.presentation import result_text
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from ..workflow.quickstart import quickstart
from .options import Changes, DataOptions, Device, data_option, dotted_changes, option, print_json, say


@dataclass(kw_only=True)
class Quickstart(DataOptions):
    """Run all steps on your own images: stages, train, sample, evaluate, report.

    All settings are chosen for the images and this device, and printed with the reasons. Ctrl-C stops; the same command
    continues.

    Examples
      msdiff quickstart photos/
      msdiff quickstart photos.zip --size 64 64 --out runs/photos --set training.steps=20000
    """

    data: Annotated[Positional[str], data_option()]
    size: Annotated[tuple[int, int] | None, option("H W", "the images' own, at most 32 on a CPU, 64 on a GPU")] = None
    """Height and width of the images (one number: a square); larger images are reduced and cut to the centre (--fit)."""
    out: Annotated[Path | None, option("FOLDER", "runs/ and the name of DATA")] = None
    """The run's folder."""
    set: Changes = ()
    """Settings that are not to be chosen, e.g. training.steps=20000. In a folder that holds a run: its steps, intervals, names of
    classes, metrics and execution.* may change, nothing else."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    json: bool = False
    """Print the evaluation as JSON."""

    def run(self) -> None:
        """Run the command."""
        changes = dotted_changes({"data.source": self.data, **self.dotted()}, self.set)
        with TrainingProgress() as progress:
            page, result = quickstart(
                self.data,
                self.out or self.folder(),
                changes,
                device=self.device,
                callbacks=[progress],
                bar=Bar,
                tell=lambda auto: console.print(auto.table()),
            )
        show_results(page, result, json=self.json)

    def folder(self) -> Path:
        """Return the run's folder when none is given."""
        require_source(self.data)
        name = to_path(self.data).resolve().name.removesuffix(".zip") if to_path(self.data).exists() else self.data
        if not name or any(mark in name for mark in "/:"):
            raise UserError(f"--out is missing: {self.data!r} gives the run's folder no name; name it")
        return Path("runs") / name


def show_results(page: Path, result: EvaluationResult | None, *, json: bool) -> None:
    """Print an evaluation, if there is one, and where samples, stages and report are."""
    if json:
        print_json({**({} if result is None else to_dict(result)), "report": str(page)})
        return
    run = Run.open(page.parent)
    step, config = checkpoint_step(run.checkpoint("best")), run.config()
    compared = "" if result is None else " and compared with held-out images"
    say(f"best checkpoint: step {step} of {config.training.steps}; its samples are drawn{compared}")
    if result is not None:
        say(result_text(result))
        if config.evaluation.every:
            say(
                f"(distances while training are of {config.evaluation.count} samples to the training images: compare them with "
                "one another, not with this one)"
            )
    for name, what in (
        ("samples.png", "samples"),
        ("stages.png", "stages"),
        (page.name, "report: open in a browser"),
    ):
        say(f"{page.parent / name}  ({what})")
