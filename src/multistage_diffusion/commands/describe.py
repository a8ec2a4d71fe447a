"""msdiff describe: the stages, widths and cost of a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config import RunConfig
from ..config.presets import PRESETS, preset
from ..errors import UserError
from ..files import write_atomic
from ..reporting.describe import describe, description_table
from ..training.run import Run
from .options import SamplerOptions, check_out, option, print_json, say


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
        """Return the configuration of the run or preset of that name; a run takes precedence."""
        path = Path(self.what)
        if Run(path).config_file.exists():
            return Run.open(path).config()
        if self.what in PRESETS:
            return preset(self.what)
        raise UserError(f"{self.what}: neither a run's folder nor a preset (msdiff presets lists them)")
