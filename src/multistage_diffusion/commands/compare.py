"""msdiff compare: runs on the same held-out images and noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config.serialization import to_dict
from ..console import Bar
from ..errors import UserError
from ..reporting.comparison_page import bound_words, write_comparison
from ..training.run import Run
from ..workflow.compare_runs import COUNT, LEVELS, compare_runs
from .options import Device, check_out, print_json, say


@dataclass(kw_only=True)
class Compare:
    """Compare runs on the same held-out images and noise; the first one is the base.

    Writes OUT (HTML), with denoising errors by noise level, and quality against the compute of training and of sampling,
    and a PNG of the charts beside it. Quality while training is logged by runs with evaluation.every; quality by
    sampling is that of msdiff evaluate with several --calls.

    With --excess the base is the least error that any denoiser can have: that of the optimal denoiser of the training
    images, on these. Where a network's excess is large, more training or another decoder can help.

    Examples
      msdiff compare runs/one runs/three
      msdiff compare runs/one runs/three runs/four --checkpoint latest --out four.html
      msdiff compare runs/three --excess --out excess.html
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(name="RUN", metavar="RUN RUN ...")]
    """Trained runs on the same data."""
    out: Path = Path("comparison.html")
    """File of the page."""
    checkpoint: str = "best"
    """best, latest or a step."""
    count: int = COUNT
    """Images, at most."""
    levels: int = LEVELS
    """Noise levels, evenly spaced in ln sigma over the training noise that all runs share."""
    excess: bool = False
    """Compare on training images with their optimal denoiser."""
    seed: int = 0
    """Seed of the noise."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the numbers as JSON."""

    def run(self) -> None:
        """Run the command."""
        if self.out.suffix not in (".html", ".htm"):
            raise UserError(f"--out {self.out}: is a page; name it {self.out.with_suffix('.html')}")
        for path in (self.out, self.out.with_suffix(".png")):
            check_out(path, self.overwrite)
        with Bar("comparing", "rows") as bar:
            found = compare_runs(
                self.runs,
                count=self.count,
                levels=self.levels,
                seed=self.seed,
                checkpoint=self.checkpoint,
                excess=self.excess,
                device=self.device,
                progress=bar,
            )
        pixels = not Run.open(self.runs[0]).config().codec.used
        out, picture = write_comparison(found, self.out, pixels=pixels)
        if self.json:
            print_json(to_dict(found))
            return
        for run in found.runs[1:]:
            bound, base = bound_words(run.bound, pixels), found.runs[0].name
            say(f"{run.name}: variational bound less that of {base}: {bound} (below 0 is better than {base})")
        say(f"written: {out}, {picture}")
