"""The command that plans a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional

from ..config import RunConfig
from ..config.presets import PRESETS, preset
from ..config.serialization import override
from ..console import Bar, console
from ..errors import UserError
from ..planning import PlannedStage
from ..reporting.describe import training_table
from ..stage_finding import StageResult
from ..workflow.auto import auto_config
from ..workflow.plan import Planned, explained_file, plan
from .options import (
    Changes,
    DataOptions,
    Device,
    check_out,
    data_option,
    dotted_changes,
    load_config,
    option,
    print_json,
    say,
)


@dataclass(kw_only=True)
class Plan(DataOptions):
    """Plan a model for a data set and a budget: stages from the data, decoder widths from two short probes.

    Writes OUT, a configuration for msdiff train --config, and the reasons to OUT's name with .explained.json.

    Examples
      msdiff plan digits --out plan.json
      msdiff plan digits --budget 12 --stages 4 --probe-steps 600
      msdiff plan photos/ --out photos.json
      msdiff plan fashion-mnist --stages stages.json --set training.batch=64
    """

    data: Annotated[Positional[str], data_option()]
    preset: Annotated[str | None, option("NAME", "that of the name of DATA, else chosen for the images")] = None
    """The preset that gives encoder, depth, noise and training; msdiff presets lists them."""
    config: Annotated[Path | None, option("FILE")] = None
    """A configuration file (JSON or YAML) instead of a preset."""
    budget: Annotated[float | None, option("MFLOPS", "that of the preset's network")] = None
    """Mean forward MFLOPs of a denoiser call for one image: 2 per multiply-add, encoder included."""
    stages: Annotated[str, option("N|FILE", "3")] = "3"
    """Number of stages to find (3: by algorithm 1 of msdiff stages; others: by algorithm 2), or a stages.json with them."""
    probe_steps: int = 300
    """Training steps of each of the two probes."""
    set: Changes = ()
    """Changes to the preset, e.g. training.batch=64."""
    out: Path = Path("plan.json")
    """File of the configuration."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the reasons as JSON."""

    def run(self) -> None:
        """Run the command."""
        if self.out.suffix != ".json":
            raise UserError(f"--out {self.out}: a plan is JSON; name it {self.out.with_suffix('.json')}")
        for path in (self.out, explained_file(self.out)):
            check_out(path, self.overwrite)
        changes = dotted_changes({"data.source": self.data, **self.dotted()}, self.set)
        number = int(self.stages) if re.fullmatch(r"[+-]?\d+", self.stages) else None
        planned = plan(
            override(self.base(changes), changes),
            result=None if number is not None else StageResult.load(Path(self.stages)),
            stages=3 if number is None else number,
            budget=None if self.budget is None else self.budget * 1e6,
            probe_steps=self.probe_steps,
            out=self.out,
            device=self.device,
            bar=Bar,
        )
        if self.json:
            print_json(planned.explained())
            return
        say(plan_text(planned))
        say(f"written: {self.out}, {explained_file(self.out)} (next: msdiff train --config {self.out} --out RUN)")

    def base(self, changes: dict[str, Any]) -> RunConfig:
        """Return the configuration that the plan is made from: without a preset, that which is chosen for the images."""
        if self.preset is not None and self.config is not None:
            raise UserError("--preset NAME and --config FILE both give the configuration; give one of them")
        if self.config is not None:
            return load_config(self.config)
        name = self.preset or self.data.partition(":")[0]
        if self.preset is not None or name in PRESETS:
            return preset(name)
        auto = auto_config(self.data, changes, device=self.device)
        console.print(auto.table(without=("stages", "training.steps")))  # of a training, not of the plan
        return auto.config


HEAD = ("stage", "sigma", "share", "weight", "narrow", "wide", "optimal", "gain", "width", "MFLOPs")


def plan_text(planned: Planned) -> str:
    """Return a plan as a table, about 100 columns wide, and its reasons."""
    rows = [HEAD, *(_row(stage) for stage in planned.stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    narrow, wide = planned.probe_widths
    return "\n".join(
        [
            *table,
            "",
            f"edges: {planned.edges_from}; probes: decoders of width {narrow} and {wide}, {planned.probe_steps} steps; losses on "
            f"{planned.held_out_rows} held-out rows a stage",
            f"planned: {planned.flops / 1e6:.4g} MFLOPs a row (budget {planned.budget / 1e6:.4g}, of them the encoder "
            f"{planned.flops_encoder / 1e6:.4g})",
            "",
            training_table(planned.config),
            "",
            *planned.sentences,
        ]
    )


def _row(stage: PlannedStage) -> tuple[str, ...]:
    low, high = stage.sigma
    return (
        str(stage.stage),
        f"[{low:.3g}, {'inf' if high is None else format(high, '.3g')})",
        f"{stage.share:.3f}",
        f"{stage.weight:.3f}",
        f"{stage.loss_narrow:.4g}",
        f"{stage.loss_wide:.4g}",
        "-" if stage.loss_optimal is None else f"{stage.loss_optimal:.4g}",
        f"{stage.gain:.2g} ± {stage.gain_error:.1g}",
        str(stage.width),
        f"{stage.flops / 1e6:.4g}",
    )
