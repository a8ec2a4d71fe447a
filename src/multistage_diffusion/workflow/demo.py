"""The demo: all steps of the workflow on real handwritten digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.presets import preset
from ..config.serialization import override
from ..evaluation import EvaluationResult
from ..training.callbacks import Callback
from ..training.run import Run
from ..training.trainer import Trainer
from .quickstart import Bars, continued, refuse_others, same_command_continues, show
from .stages import find_stages
from .train import train


@same_command_continues()
def demo(
    out: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    device: str | None = None,
    callbacks: Sequence[Callback[Trainer]] = (),
    bar: Bars,
) -> tuple[Path, EvaluationResult | None]:
    """Run stages, train, sample, evaluate and report on the digits; an interrupted demo is continued.

    Args:
        out: the run's folder.
        changes: dotted keys of the digits preset to change.
        device: default CUDA when there is one.
        callbacks: callbacks of the training.
        bar: makes a progress display from a title and a unit.

    Returns:
        The report's path and the evaluation; None if no images are held out.

    Raises:
        UserError: if the folder holds another run.
    """
    if Run(out).config_file.exists():
        run = Run.open(out)
        stages = {"stages": run.config().stages}  # found, not of the preset
        refuse_others(run, override(preset("digits"), {**stages, **(changes or {})}))
        run = continued(run, changes or {}, device=device, callbacks=callbacks)
    else:
        config = override(preset("digits"), changes or {})
        Run.require_room(out, replace=False)
        with bar("finding stages", "samples") as progress:
            result = find_stages(config.data, progress=progress, device=device)
        run = train(config, out, result=result, device=device, callbacks=callbacks)
    return show(run, device=device, bar=bar)
