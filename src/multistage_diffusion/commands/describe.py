"""Commands that look at runs: description, report; and the demo, which does everything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config import RunConfig
from ..config.presets import PRESETS, preset
from ..config.serialization import to_dict
from ..console import Bar, TrainingProgress
from ..errors import UserError
from ..files import write_atomic
from ..reporting.describe import describe, description_table
from ..reporting.pictures import MOST_IN_GRID
from ..training.run import Run
from ..workflow.demo import demo
from ..workflow.sample import report
from .evaluate import evaluation_text
from .options import Changes, Device, RunFolder, SamplerOptions, check_out, option, parse_changes, print_json, say


@dataclass(kw_only=True)
class Describe(SamplerOptions):
    """Show a run's (or preset's) stages, widths, parameters and multiply-adds; draw its network.

    Examples
      msdiff describe runs/digits
      msdiff describe cifar10-dpm --calls 50 --json
      msdiff describe cifar10-dpm --out network.png
    """

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="RUN", metavar="RUN")]
    """A run's folder or a preset's name."""
    out: Annotated[Path | None, option("FILE")] = None
    """Draw the network, to scale: a .png or .svg file."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        """Run the command."""
        if self.out is not None:
            if self.out.suffix not in (".png", ".svg"):
                raise UserError(f"--out {self.out}: must end in .png or .svg")
            check_out(self.out, self.overwrite)
        config = self.config()
        described = describe(config, self.sampling_config(config.sampling))
        if self.out is not None:
            from ..reporting.network_drawing import draw_network  # matplotlib takes a while to import

            write_atomic(self.out, draw_network(config.network, described, self.out.suffix[1:]))
        if self.json:
            print_json(described)
            return
        say(description_table(described))
        if self.out is not None:
            say(f"\nwritten: {self.out}")

    def config(self) -> RunConfig:
        """Return the configuration of the run, or else of the preset, that is called so."""
        path = Path(self.what)
        if Run(path).config_file.exists():
            return Run.open(path).config()
        if self.what in PRESETS:
            return preset(self.what)
        raise UserError(f"{self.what}: neither a run's folder nor a preset (msdiff presets lists them)")


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


@dataclass(kw_only=True)
class Demo:
    """Do the whole job on real handwritten digits in a few minutes: stages, train, sample, evaluate, report.

    Examples
      msdiff demo --out runs/demo
    """

    out: Path = Path("runs/demo")
    """The run's folder; an interrupted demo goes on where it stopped."""
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
        if self.json:
            print_json({**to_dict(result), "report": str(page)})
            return
        say(evaluation_text(result))
        for name, what in (
            ("samples.png", "samples"),
            ("stages.png", "stages"),
            (page.name, "report: open in a browser"),
        ):
            say(f"{self.out / name}  ({what})")
