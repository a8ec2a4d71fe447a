"""The commands of the command line: each is a dataclass of options whose `run` calls one function of `workflow`.

Results go to standard output (JSON with --json), progress and notes to standard error.
"""

from typing import Any

from .judging import Demo, Describe, Evaluate, Report
from .making import Sample, Split, Train
from .paper import Presets, Tables

COMMANDS: dict[str, type[Any]] = {
    c.__name__.lower(): c for c in (Split, Train, Sample, Evaluate, Describe, Report, Demo, Presets, Tables)
}

__all__ = ["COMMANDS"]
