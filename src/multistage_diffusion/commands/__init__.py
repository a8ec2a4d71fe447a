"""The commands of the command line: each is a dataclass of options whose `run` calls one function of `workflow`.

Results go to standard output (JSON with --json), progress and notes to standard error.
"""

from typing import Any

from .coding import TrainCodec
from .evaluating import Evaluate, Stats
from .exchange import Export, Import
from .judging import Demo, Describe, Report
from .making import Sample, Train
from .paper import Presets, Tables
from .planning import Plan
from .splitting import Split

COMMANDS: dict[str, type[Any]] = {
    "split": Split,
    "train": Train,
    "train-codec": TrainCodec,
    "sample": Sample,
    "evaluate": Evaluate,
    "stats": Stats,
    "plan": Plan,
    "describe": Describe,
    "report": Report,
    "demo": Demo,
    "import": Import,
    "export": Export,
    "presets": Presets,
    "tables": Tables,
}

__all__ = ["COMMANDS"]
