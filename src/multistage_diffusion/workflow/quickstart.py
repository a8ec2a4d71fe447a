"""The whole workflow in one call: stages, training, samples, evaluation and report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..config.serialization import to_dict
from ..data.sources import located
from ..errors import UserError
from ..evaluation import EvaluationResult
from ..progress import Progress
from ..reporting.pictures import grid, save_png
from ..training.callbacks import Callback
from ..training.run import Run
from ..training.trainer import Trainer
from .auto import AutoConfig, auto_config
from .evaluate import evaluate, evaluated
from .report import report
from .resume import resume
from .sample import sample
from .train import TrainingStopped, train

Bars = Callable[[str], AbstractContextManager[Progress]]
SAMPLES = 100  # in the grid
SCORED = 1000  # samples of the evaluation
PICTURE = "samples.png"


def quickstart(
    data: str,
    out: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    callbacks: Sequence[Callback[Trainer]] = (),
    bar: Bars,
    tell: Callable[[AutoConfig], None] = lambda _: None,
) -> tuple[Path, EvaluationResult]:
    """Choose a configuration for the images, train, sample, evaluate and report; what was interrupted is continued.

    Args:
        data: the source of the images.
        out: the run's folder.
        changes: dotted keys that are not chosen.
        device: default CUDA when there is one.
        callbacks: callbacks of the training.
        bar: makes a progress display from a title.
        tell: called with the choice before the training.

    Returns:
        The report's path and the evaluation.

    Raises:
        UserError: if the folder holds a run on other images, or on these read in another way.
    """
    if Run(out).config_file.exists():
        there = to_dict(Run(out).config().data)
        for key, value in {**(changes or {}), "data.source": located(data)}.items():
            name = key.removeprefix("data.")
            if name != key and there.get(name) != to_dict(value):
                raise UserError(
                    f"{out}: holds a run with {key}={there.get(name)}, not {to_dict(value)}; choose another --out"
                )
        kept = {key: value for key, value in (changes or {}).items() if not key.startswith("data.")}
        with same_command_continues():
            run = resume(out, kept, device=device, callbacks=callbacks)
    else:
        Run.require_room(out, replace=False)
        with bar("finding stages") as progress:
            auto = auto_config(data, changes, device=device, progress=progress)
        tell(auto)
        with same_command_continues():
            run = train(auto.config, out, result=auto.result, device=device, callbacks=callbacks)
    return show(run, device=device, bar=bar)


@contextmanager
def same_command_continues() -> Iterator[None]:
    """Say of a training that is stopped inside that the same command goes on with it."""
    try:
        yield
    except TrainingStopped as stopped:
        raise KeyboardInterrupt(f"{stopped.what}; the same command goes on") from None


def show(run: Run, *, device: str | None, bar: Bars) -> tuple[Path, EvaluationResult]:
    """Write RUN/samples.png, evaluate the run and write its report; return the report's path and the evaluation.

    Nothing is drawn again for a checkpoint that was evaluated in the same way.
    """
    features = run.config().evaluation.features
    scores = None if not (run.path / PICTURE).exists() else evaluated(run, count=SCORED, features=features)
    if scores is None:
        with bar("sampling") as progress:
            save_png(grid(sample(run, SAMPLES, device=device, progress=progress)), run.path / PICTURE)
        with bar("evaluating") as progress:
            scores = evaluate(run, count=SCORED, features=features, device=device, progress=progress)
    with bar("reporting") as progress:
        return report(run, device=device, progress=progress), scores
