"""msdiff demo: the whole workflow on the digits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..console import Bar, TrainingProgress
from ..workflow.demo import demo
from .options import Changes, Device, parse_changes
from .quickstart import show_results


@dataclass(kw_only=True)
class Demo:
    """Run all steps on real handwritten digits in a few minutes: stages, train, sample, evaluate, report.

    Examples
      msdiff demo --out runs/demo
    """

    out: Path = Path("runs/demo")
    """The run's folder; an interrupted demo is continued."""
    set: Changes = ()
    """Changes to the digits preset, e.g. training.steps=2000."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    json: bool = False
    """Print the evaluation as JSON."""

    def run(self) -> None:
        """Run the command."""
        with TrainingProgress() as progress:
            page, result = demo(self.out, parse_changes(self.set), device=self.device, callbacks=[progress], bar=Bar)
        show_results(page, result, json=self.json)
