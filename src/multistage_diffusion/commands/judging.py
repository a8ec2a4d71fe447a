"""Commands that look at runs: evaluation, description, report; and the demo, which does everything."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..config import RunConfig
from ..console import Bar, TrainingProgress
from ..demo import demo
from ..description import describe, description_table
from ..evaluation import EvaluationResult
from ..presets import PRESETS, preset
from ..serialization import to_dict, write_atomic
from ..training.run import Run
from ..workflow import evaluate, report
from .options import (
    Changes,
    DataOptions,
    Device,
    RunFolder,
    SamplerOptions,
    check_out,
    option,
    parse_changes,
    print_json,
)


@dataclass(kw_only=True)
class Evaluate(SamplerOptions, DataOptions):
    """Compare samples of a run with real images: Fréchet distance, precision and recall, memorisation.

    Pixel features work offline; their numbers are not comparable with Inception FID. The result is added to
    RUN/evaluation.json and shown by msdiff report.

    Examples
      msdiff evaluate runs/digits
      msdiff evaluate runs/digits --data digits --count 2000 --json
    """

    run_folder: RunFolder
    """A trained run's folder."""
    data: Annotated[str | None, option("DATA", "the run's, with its own held-out images")] = None
    """Other images to compare with, read as the run's unless said otherwise."""
    count: Annotated[int | None, option("INT", "as many as held-out images, but 500 to 5000")] = None
    """Samples drawn."""
    features: str = "pixels"
    """Feature extractor."""
    seed: int = 0
    """Seed of the samples."""
    checkpoint: str = "best"
    """best, latest or a step."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        run = Run.open(self.run_folder)
        config, given = run.config(), self.given()
        if given and self.data is None:
            raise ValueError(
                f"--{next(iter(given)).replace('_', '-')} needs --data: the run's own data are read as before"
            )
        data = None
        if self.data is not None:
            data = dataclasses.replace(config.data, source=self.data, fingerprint="", shape=(), **given)
        with Bar("evaluating", "calls") as bar:
            result = evaluate(
                run,
                data,
                count=self.count,
                features=self.features,
                seed=self.seed,
                checkpoint=self.checkpoint,
                sampling=self.sampling_config(config.sampling),
                device=self.device,
                progress=bar,
            )
        if self.json:
            print_json(to_dict(result))
        else:
            print(evaluation_text(result))


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
                raise ValueError(f"--out {self.out}: must end in .png or .svg")
            check_out(self.out, self.overwrite)
        config = self.config()
        described = describe(config, self.sampling_config(config.sampling))
        if self.out is not None:
            from ..network_picture import draw_network  # matplotlib takes a while to import

            write_atomic(self.out, draw_network(config.network, described, self.out.suffix[1:]))
        if self.json:
            print_json(described)
            return
        print(description_table(described))
        if self.out is not None:
            print(f"\nwritten: {self.out}")

    def config(self) -> RunConfig:
        """Return the configuration of the run, or else of the preset, that is called so."""
        path = Path(self.what)
        if Run(path).config_file.exists():
            return Run.open(path).config()
        if self.what in PRESETS:
            return preset(self.what)
        raise ValueError(f"{self.what}: neither a run's folder nor a preset (msdiff presets lists them)")


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
        with Bar("reporting", "calls") as bar:
            path = report(run, checkpoint=self.checkpoint, count=self.count, device=self.device, progress=bar)
        print(f"written: {path}")


@dataclass(kw_only=True)
class Demo:
    """Do the whole job on real handwritten digits in a few minutes: split, train, sample, evaluate, report.

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
        print(evaluation_text(result))
        for name, what in (
            ("samples.png", "samples"),
            ("split.png", "stages"),
            (page.name, "report: open in a browser"),
        ):
            print(f"{self.out / name}  ({what})")


def evaluation_text(result: EvaluationResult) -> str:
    """Return an evaluation in words."""
    through_codec = result.frechet_reconstructed
    codec = "" if through_codec is None else f"; held-out images through the codec: {through_codec:.4g}"
    return "\n".join(
        (
            f"{result.extractor} features ({result.comparable_to}); {result.count} images a side, mean of {result.splits} draws",
            f"{result.samples} samples drawn"
            + (
                "; fewer images than dimensions: compare only with figures of equal counts"
                if result.rank_deficient
                else ""
            ),
            f"Fréchet distance   {result.frechet:.4g}   (real images: {result.frechet_real:.4g}{codec})",
            f"precision, recall  {result.precision:.3f}, {result.recall:.3f}   (real images: {result.precision_real:.3f}, "
            f"{result.recall_real:.3f}; k = {result.k})",
            f"memorised          {100 * result.memorised:.1f} %   (held-out images: {100 * result.memorised_held_out:.1f} %)",
        )
    )
