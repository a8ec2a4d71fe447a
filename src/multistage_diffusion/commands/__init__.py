"""The commands of the command line: each is a dataclass of options whose `run` calls one function of `workflow`.

Results go to standard output (JSON with --json), progress and notes to standard error.
"""

from typing import Any

from .boundary import ConvertBoundary
from .codec import TrainCodec
from .compare import Compare
from .demo import Demo
from .describe import Describe
from .evaluate import Evaluate, Stats
from .export import Export
from .import_run import Import
from .pack import Pack
from .plan import Plan
from .push import Push
from .quickstart import Quickstart
from .report import Report
from .sample import Sample
from .stages import FindStages
from .tables import Presets, Tables
from .train import Train

COMMANDS: dict[str, type[Any]] = {
    "quickstart": Quickstart,
    "stages": FindStages,
    "boundary": ConvertBoundary,
    "train": Train,
    "train-codec": TrainCodec,
    "sample": Sample,
    "evaluate": Evaluate,
    "compare": Compare,
    "stats": Stats,
    "pack": Pack,
    "plan": Plan,
    "describe": Describe,
    "report": Report,
    "demo": Demo,
    "import": Import,
    "export": Export,
    "push": Push,
    "presets": Presets,
    "tables": Tables,
}

__all__ = ["COMMANDS"]
