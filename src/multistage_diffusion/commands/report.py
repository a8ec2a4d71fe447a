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
    """Checkpoint of the samples: best, latest or a step."""
    count: int = 64
    """Number of samples."""
    device: Device = None
    """cpu, cuda or cuda:N"""

    def run(self) -> None:
        """Run the command."""
        run = Run.open(self.run_folder)
        if not 1 <= self.count <= MOST_IN_GRID:
            raise UserError(f"count={self.count} must be between 1 and {MOST_IN_GRID}")
        with Bar("reporting", "samples") as bar:
            path = report(run, checkpoint=self.checkpoint, count=self.count, device=self.device, progress=bar)
        say(f"written: {path}")
