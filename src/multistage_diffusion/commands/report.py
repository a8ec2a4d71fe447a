"""msdiff report: write the HTML report of a run."""

from __future__ import annotations

from dataclasses import dataclass

from ..console import Bar
from ..errors import UserError
from ..reporting.pictures import MOST_IN_GRID
from ..training.run import Run
from ..workflow.report import report
from .options import Device, RunFolder, say


@dataclass(kw_only=True)
class Report:
    """Write RUN/report.html: one file with stages, network, losses, samples, neighbours, metrics and configuration.

    Examples
      msdiff report runs/digits
    """

    run_folder: RunFolder
    """A trained run's folder."""
    checkpoint: str = "best"
    """best, latest or a step: whose samples are shown."""
    count: int = 64
    """Samples shown."""
    device: Device = None
    """cpu, cuda or cuda:N"""

    def run(self) -> None:
        """Run the command."""
        run = Run.open(self.run_folder)
        if not 1 <= self.count <= MOST_IN_GRID:
            raise UserError(f"count={self.count}: a report shows 1 to {MOST_IN_GRID} samples")
        with Bar("reporting", "calls") as bar:
            path = report(run, checkpoint=self.checkpoint, count=self.count, device=self.device, progress=bar)
        say(f"written: {path}")
