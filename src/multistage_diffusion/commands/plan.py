"""The command that plans a model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from tyro.conf import Positional

from ..config import RunConfig
from ..config.presets import PRESETS, preset
from ..config.serialization import override
from ..console import Bar, console
from ..errors import UserError
from ..planning import PlannedStage
from ..reporting.describe import sampling_flops, training_table
from ..schedules import LogNormal
from ..stage_finding import StageResult
from ..workflow.auto import auto_config
from ..workflow.plan import Edges, Planned, explained_file, plan
from .options import (
    Changes,
    DataOptions,
    Device,
    check_out,
    data_option,
    dotted_changes,
    load_config,
    one_of,
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
    """Number of stages to find, or a stages.json with them."""
    edges: Annotated[
        Edges | None, option(one_of(get_args(Edges)), "optimal; even if the preset is chosen for the images")
    ] = None
    """From the optimal denoiser (three stages: algorithm 1, others: 2), from the Gaussian one, or even in VP time."""
    density: Literal["given", "auto"] = "given"
    """given: the preset's training density; auto: the one proposed from the images."""
    sampling_weight: float = 0.0
    """How much sampling counts in the budget, 0 to below 1, beside training: a stage costs by its share of calls and of rows."""
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
        if number is None and self.edges is not None:
            raise UserError(f"--edges {self.edges}: --stages {self.stages} gives the edges; leave one of them out")
        base, own = self.base(changes)
        planned = plan(
            override(base, changes),
            result=None if number is not None else StageResult.load(Path(self.stages)),
            stages=3 if number is None else number,
            edges=self.edges or ("even" if own else "optimal"),
            density=self.density,
            sampling_weight=self.sampling_weight,
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

    def base(self, changes: dict[str, Any]) -> tuple[RunConfig, bool]:
        """Return the configuration that the plan is made from, and whether it is chosen for the images, for want of a preset."""
        if self.preset is not None and self.config is not None:
            raise UserError("--preset NAME and --config FILE both give the configuration; give one of them")
        if self.config is not None:
            return load_config(self.config), False
        name = self.preset or self.data.partition(":")[0]
        if self.preset is not None or name in PRESETS:
            return preset(name), False
        auto = auto_config(self.data, changes, device=self.device)
        console.print(auto.table(without=("stages", "training.steps")))  # of a training, not of the plan
        return auto.config, True


HEAD = ("stage", "sigma", "share", "calls", "weight", "narrow", "wide", "optimal", "gain", "width", "MFLOPs")


def plan_text(planned: Planned) -> str:
    """Return a plan as a table, about 100 columns wide, and its reasons."""
    rows = [HEAD, *(_row(stage) for stage in planned.stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    narrow, wide = planned.probe_widths
    prior = planned.config.diffusion.prior
    proposed = None
    if planned.density == "auto" and isinstance(prior, LogNormal):
        proposed = f"training density proposed from the images: ln sigma {prior.p_mean:g} ± {prior.p_std:g}"
    counted = f", sampling counted by {planned.sampling_weight:g}" if planned.sampling_weight else ""
    return "\n".join(
        [
            *table,
            "",
            f"edges: {planned.edges_from}; probes: decoders of width {narrow} and {wide}, {planned.probe_steps} steps; losses on "
            f"{planned.held_out_rows} held-out rows a stage",
            *filter(None, [proposed]),
            f"planned: {planned.flops / 1e6:.4g} MFLOPs a row{counted} (budget {planned.budget / 1e6:.4g}, of them the encoder "
            f"{planned.flops_encoder / 1e6:.4g}); sampling: {sampling_flops(planned.config) / 1e6:.4g} MFLOPs an image, in "
            f"{sum(stage.calls for stage in planned.stages)} calls",
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
        str(stage.calls),
        f"{stage.weight:.3f}",
        f"{stage.loss_narrow:.4g}",
        f"{stage.loss_wide:.4g}",
        "-" if stage.loss_optimal is None else f"{stage.loss_optimal:.4g}",
        f"{stage.gain:.2g} ± {stage.gain_error:.1g}",
        str(stage.width),
        f"{stage.flops / 1e6:.4g}",
    )
