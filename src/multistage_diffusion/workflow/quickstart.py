"""The whole workflow in one call: stages, training, samples, evaluation and report."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from ..config import RunConfig
from ..config.serialization import override
from ..data.sources import located
from ..errors import UserError
from ..evaluation import EvaluationResult, get_features
from ..progress import Progress
from ..reporting.pictures import grid, save_png
from ..training.callbacks import Callback
from ..training.checkpoint import checkpoint_step, list_checkpoints
from ..training.run import Run
from ..training.trainer import Trainer
from .auto import AutoConfig, auto_config
from .differences import CHANGEABLE, differences, dotted
from .evaluate import evaluate, evaluated
from .report import report
from .resolve import RESOLVED
from .resume import resume
from .sample import sample
from .train import TrainingStopped, train

Bars = Callable[[str, str], AbstractContextManager[Progress]]  # from a title and the unit of what is counted
SAMPLES = 100  # in the grid
SCORED = 1000  # samples of the evaluation, at most
FREE = {"name", *RESOLVED, *CHANGEABLE} - {"data.source", "codec.source"}  # keys that do not tell runs apart
DRAWS = 6  # times as many samples as held-out images: what five random draws of these use
PICTURE, STEP = "samples.png", "step"  # the samples, and the key of their step in the file
REPORT, REPORTED = "report.html", ("config.json", "metrics.jsonl", "evaluation.json", PICTURE, "stages.json")


@contextmanager
def same_command_continues() -> Iterator[None]:
    """Say of work that is interrupted inside that the same command goes on with it."""
    try:
        yield
    except TrainingStopped as stopped:
        raise KeyboardInterrupt(f"{stopped.what}; the same command goes on") from None
    except KeyboardInterrupt as interrupt:
        what = interrupt.args[0] if interrupt.args else "interrupted"
        raise KeyboardInterrupt(f"{what}; the same command goes on") from None


@same_command_continues()
def quickstart(
    data: str,
    out: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    callbacks: Sequence[Callback[Trainer]] = (),
    bar: Bars,
    tell: Callable[[AutoConfig], None] = lambda _: None,
) -> tuple[Path, EvaluationResult | None]:
    """Choose a configuration for the images, train, sample, evaluate and report; what was interrupted is continued.

    Args:
        data: the source of the images.
        out: the run's folder.
        changes: dotted keys that are not chosen.
        device: default CUDA when there is one.
        callbacks: callbacks of the training.
        bar: makes a progress display from a title and a unit.
        tell: called with the choice before the training.

    Returns:
        The report's path and the evaluation; None if no images are held out.

    Raises:
        UserError: if the folder holds a run on other images, or with other settings than those given.
    """
    if features := (changes or {}).get("evaluation.features"):
        get_features(str(features))  # told before the training, after which they are needed
    if Run(out).config_file.exists():
        run, wanted = Run.open(out), {**(changes or {}), "data.source": located(data)}
        refuse_others(run, override(run.config(), wanted))
        kept = {key: value for key, value in wanted.items() if key in CHANGEABLE and key != "data.source"}
        run = continued(run, kept, device=device, callbacks=callbacks)
    else:
        Run.require_room(out, replace=False)
        with bar("encoding", "images") as progress:
            auto = auto_config(data, changes, device=device, progress=progress)
        tell(auto)
        run = train(auto.config, out, result=auto.result, device=device, callbacks=callbacks)
    return show(run, device=device, bar=bar)


def refuse_others(run: Run, wanted: RunConfig) -> None:
    """Raise UserError if a run has other settings than those wanted, apart from those that may change when it is resumed."""
    there, asked = dotted(run.config()), dotted(wanted)
    others = [key for key in differences(wanted, run.config()) if key not in FREE]
    if others:
        told = "; ".join(f"{key}={there.get(key)}, not {asked.get(key)}" for key in others)
        raise UserError(f"{run.path}: holds a run with {told}; choose another --out (--help tells what may change)")


def continued(
    run: Run, changes: Mapping[str, Any], *, device: str | None, callbacks: Sequence[Callback[Trainer]]
) -> Run:
    """Resume a run with changes, unless its last step is done."""
    found = list_checkpoints(run.checkpoints)
    if found and checkpoint_step(found[-1]) >= override(run.config(), changes).training.steps:
        return run
    return resume(run.path, changes, device=device, callbacks=callbacks)


def step_of_picture(path: Path) -> int | None:
    """Return the step whose samples a picture of `show` holds; None for any other file, or none."""
    try:
        with Image.open(path) as image:
            return int(image.info[STEP])
    except (OSError, KeyError, ValueError):
        return None


def _scores(run: Run, *, device: str | None, bar: Bars) -> EvaluationResult | None:
    """Return the evaluation of the best checkpoint; None, with a warning, if no images are held out."""
    _, held_out = run.data().split(run.config().data.held_out)
    if not len(held_out):
        warnings.warn("not evaluated: no images are held out; give a new run a larger --held-out", stacklevel=3)
        return None
    features, count = run.config().evaluation.features, min(SCORED, max(SAMPLES, DRAWS * len(held_out)))
    known = evaluated(run, count=count, features=features)
    if known is not None:
        return known
    with bar("evaluating", "images") as progress:
        return evaluate(run, count=count, features=features, device=device, progress=progress)


def show(run: Run, *, device: str | None, bar: Bars) -> tuple[Path, EvaluationResult | None]:
    """Write RUN/samples.png, evaluate the run and write its report; return the report's path and the evaluation, if any.

    Nothing is made again for a checkpoint that was drawn, evaluated and reported before.
    """
    picture, step = run.path / PICTURE, checkpoint_step(run.checkpoint("best"))
    if step_of_picture(picture) != step:
        with bar("sampling", "samples") as progress:
            images = sample(run, SAMPLES, in_turn=True, device=device, progress=progress)
            save_png(grid(images, captions=images.class_names), picture, {STEP: str(step)})
    scores = _scores(run, device=device, bar=bar)
    if up_to_date(page := run.path / REPORT, [run.path / name for name in REPORTED]):
        return page, scores
    with bar("reporting", "samples") as progress:
        return report(run, device=device, progress=progress), scores


def up_to_date(made: Path, sources: Sequence[Path]) -> bool:
    """Return whether a file exists and is not older than any of those that it is made from; missing ones do not count."""
    if not made.exists():
        return False
    return all(path.stat().st_mtime_ns <= made.stat().st_mtime_ns for path in sources if path.exists())
