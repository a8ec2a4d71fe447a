"""msdiff push: push a run to the Hugging Face hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..console import Bar
from ..errors import UserError
from ..reporting.pictures import MOST_IN_GRID
from ..workflow.push import push
from .options import Device, RunFolder, check_out, option, say


@dataclass(kw_only=True)
class Push:
    """Push a run to the Hugging Face hub, with its code, a model card and samples.

    It becomes a pipeline of diffusers, see msdiff export --format diffusers.
    The card has the stages, the metrics of msdiff evaluate with their features, the training command and the licence. Log
    in first, with hf auth login.

    Examples
      msdiff push runs/digits me/digits --license apache-2.0
      msdiff push runs/digits me/digits --dry-run pushed/
    """

    run_folder: RunFolder
    """A trained run's folder."""
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="NAME", metavar="USER/NAME")]
    """The repository; it is made if it does not exist."""
    license: str = "unknown"
    """Licence of the weights, an identifier of the hub: apache-2.0, mit, cc-by-4.0, ..."""
    private: bool = False
    """Make a new repository private."""
    checkpoint: str = "best"
    """best, latest or a step."""
    count: int = 16
    """Number of samples in the grid."""
    dry_run: Annotated[Path | None, option("FOLDER")] = None
    """Write what would be pushed to this folder, and push nothing."""
    overwrite: bool = False
    """Replace FOLDER if an earlier dry run wrote it."""
    device: Device = None
    """cpu, cuda or cuda:N"""

    def run(self) -> None:
        """Run the command."""
        if not 1 <= self.count <= MOST_IN_GRID:
            raise UserError(f"count={self.count} must be between 1 and {MOST_IN_GRID}")
        if self.dry_run is not None:
            check_out(self.dry_run, self.overwrite, folder=True)
        with Bar("sampling", "samples") as bar:
            place = push(
                self.run_folder,
                self.name,
                licence=self.license,
                private=self.private,
                checkpoint=self.checkpoint,
                count=self.count,
                dry_run=self.dry_run,
                overwrite=self.overwrite,
                device=self.device,
                progress=bar,
            )
        say(f"{'written' if self.dry_run is not None else 'pushed'}: {place}")
