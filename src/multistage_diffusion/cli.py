"""The command line: `msdiff split | train | sample | evaluate | describe | report | demo`.

Each command is a dataclass whose `run` calls one function of `workflow`. Results go to standard output (JSON with --json),
progress and notes to standard error. A user's mistake is one line and exit code 2.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
import yaml
from tyro.conf import Positional

from . import __version__
from .config import DataConfig, RunConfig, SamplingConfig
from .console import Bar, TrainingProgress, console
from .describe import describe, description_table
from .evaluation import EvaluationResult
from .pictures import grid, save_folder, save_npz, save_png
from .presets import preset
from .schedules import SCHEDULES
from .serialization import from_dict, override, read_json, to_dict
from .splitting import SplitResult, SplitSettings
from .training.callbacks import TensorBoard
from .training.run import Run
from .training.trainer import Callback, TrainingDiverged
from .workflow import demo, evaluate, report, resume, sample, split, train

Solver = Literal["dpm", "dpm++", "ddim", "heun"]


@dataclass(kw_only=True)
class DataOptions:
    """How images are read."""

    size: tuple[int, int] | None = None
    """Height and width to bring images to (with --fit)."""
    fit: Literal["exact", "crop", "resize"] = "exact"
    """What to do with images of another size: refuse, crop to the centre, or resize."""
    skip_bad: bool = False
    """Leave out images that cannot be read instead of stopping."""
    held_out: float = 0.1
    """Share of images never trained on, chosen by a hash of their content."""

    def data_config(self, source: str) -> DataConfig:
        """Return the configuration of a data source read with these options."""
        return DataConfig(source=source, held_out=self.held_out, size=self.size, fit=self.fit, skip_bad=self.skip_bad)


@dataclass(kw_only=True)
class SamplerOptions:
    """Another sampler than the run's own."""

    solver: Solver | None = None
    """dpm (DPM-Solver), dpm++ (data prediction), ddim or heun (EDM)."""
    method: Literal["singlestep", "multistep"] | None = None
    """For dpm and dpm++."""
    order: Literal[1, 2, 3] | None = None
    """For dpm and dpm++."""
    calls: int | None = None
    """Denoiser calls per image (NFE)."""
    spacing: Literal["log-snr", "time", "edm"] | None = None
    """How noise levels are spaced."""
    churn: float | None = None
    """Stochasticity of heun (S_churn)."""
    eta: float | None = None
    """Stochasticity of ddim."""

    def sampling_config(self, own: SamplingConfig) -> SamplingConfig:
        """Return a run's sampling configuration with these options applied."""
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(SamplerOptions)}
        return dataclasses.replace(own, **{k: v for k, v in given.items() if v is not None})


@dataclass(kw_only=True)
class Split(DataOptions):
    """Find the noise ranges (stages) of a data set from the data themselves.

    DATA: digits, fashion-mnist[:FOLDER], a folder or .zip of images, .npy or .npz.
    Writes OUT (JSON) and the curves beside it (PNG).

    Examples
      msdiff split digits --out split.json
      msdiff split photos/ --size 64 64 --fit crop --algorithm 2 --stages 4 --out split.json
      msdiff split digits --data-range 0 1 --json
    """

    data: Positional[str]
    """digits, fashion-mnist[:FOLDER], a folder or .zip of images, .npy or .npz"""
    out: Path = Path("split.json")
    """Where to write the result."""
    algorithm: Literal[1, 2] = 1
    """1: three stages by similarity to the limits; 2: any number by clustering."""
    stages: int = 3
    """Number of stages (algorithm 2)."""
    samples: int | None = None
    """Noisy images compared (default 50000, or 2000 for algorithm 2)."""
    eta: float = 2 / 256
    """Largest difference of a coordinate that counts as agreement."""
    alpha: float = 0.9
    """Similarity that the outer stages keep (algorithm 1)."""
    rule: Literal["interval-mean", "pointwise"] = "interval-mean"
    """How edges are read from the curves (algorithm 1)."""
    space: Literal["eps", "x0"] | None = None
    """What is compared: noise predictions or posterior means."""
    objective: Literal["total-distance", "mean-similarity"] = "total-distance"
    """What algorithm 2 optimises."""
    data_range: tuple[float, float] = (-1.0, 1.0)
    """Range of the pixels: that of training; 0 1 reproduces the paper."""
    schedule: Literal["vp", "ve", "edm", "rectified-flow", "discrete"] = "vp"
    """Kernel in whose time edges are printed."""
    seed: int = 0
    """Seed of the samples."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: CUDA when there is one)."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        names = [f.name for f in dataclasses.fields(SplitSettings)]
        settings = SplitSettings(**{name: getattr(self, name) for name in names if hasattr(self, name)})
        for path in (self.out, self.out.with_suffix(".png")):
            refuse_existing(path, self.overwrite)
        with Bar("finding stages", "samples") as bar:
            result = split(
                self.data_config(self.data),
                settings,
                schedule=SCHEDULES[self.schedule](),
                out=self.out,
                device=self.device,
                progress=bar,
            )
        if self.json:
            print_json(result.to_dict())
            return
        for k, (t, sigma) in enumerate(zip(result.edges_t, result.edges_sigma, strict=True), start=1):
            print(f"stage {k} | {k + 1}: t = {t:.4f}, sigma = {sigma:.4f}")
        print(f"written: {self.out}, {self.out.with_suffix('.png')}")


@dataclass(kw_only=True)
class Train:
    """Train a multi-decoder model, or go on with a run.

    Settings come from a preset or a configuration file; --set changes single ones (YAML values).

    Examples
      msdiff train --preset digits --data digits --stages split.json --out runs/digits
      msdiff train --preset fashion-mnist --out runs/f --set training.steps=20000 network.dropout=0.05
      msdiff train --resume runs/digits
    """

    preset: str | None = None
    """digits, fashion-mnist, ... (msdiff describe PRESET shows one)."""
    config: Path | None = None
    """A run configuration (JSON or YAML, e.g. another run's config.json) instead of a preset."""
    data: str | None = None
    """Data set (default: the preset's); see msdiff split --help."""
    stages: Path | None = None
    """A split.json of msdiff split (default: the preset's own stages)."""
    out: Path | None = None
    """The run's new folder."""
    resume: Path | None = None
    """A run to go on with, from its latest checkpoint."""
    set: tuple[str, ...] = ()
    """KEY=VALUE ..., e.g. optimizer.lr=1e-4 data.size=[64,64] data.fit=crop."""
    replace: bool = False
    """Move a run that is already at OUT aside."""
    tensorboard: bool = False
    """Write TensorBoard events to the run (extra: track)."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: CUDA when there is one)."""

    def run(self) -> None:
        """Run the command."""
        changes = parse_changes(self.set)
        if self.data is not None:
            changes["data.source"] = self.data
        callbacks: list[Callback] = [TrainingProgress(), *([TensorBoard()] if self.tensorboard else [])]
        if self.resume is not None:
            for name in ("preset", "config", "stages", "out"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} does not go with --resume: a run keeps its own; start a new run instead"
                    )
            run = resume(self.resume, changes, device=self.device, callbacks=callbacks)
        else:
            if self.out is None:
                raise ValueError("--out is missing: name the new run's folder (or --resume RUN)")
            config = override(self.base(), changes)
            result = None if self.stages is None else SplitResult.load(self.stages)
            run = train(config, self.out, result=result, replace=self.replace, device=self.device, callbacks=callbacks)
        print(
            f"trained: {run.path} (next: msdiff sample {run.path}, msdiff evaluate {run.path}, msdiff report {run.path})"
        )

    def base(self) -> RunConfig:
        """Return the preset or the configuration file."""
        if (self.preset is None) == (self.config is None):
            raise ValueError("give one of --preset NAME, --config FILE or --resume RUN")
        if self.preset is not None:
            return preset(self.preset)
        assert self.config is not None
        return load_config(self.config)


@dataclass(kw_only=True)
class Sample(SamplerOptions):
    """Draw samples of a run: a grid (.png), a folder of PNGs, or an array (.npz).

    Sample i depends on the seed and i alone, not on the count or the batch.

    Examples
      msdiff sample runs/digits --count 64 --seed 0 --solver dpm --calls 20 --out grid.png
      msdiff sample runs/digits --count 5000 --out samples.npz
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """A trained run."""
    count: int = 64
    """Number of samples."""
    seed: int = 0
    """Seed."""
    out: Path = Path("samples.png")
    """FILE.png for a grid, FILE.npz for an array, anything else for a folder."""
    label: int | None = None
    """Class of all samples (class-conditional runs; default: all classes in turn)."""
    checkpoint: str = "best"
    """best, latest or a step."""
    batch: int = 256
    """Samples drawn at once."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: CUDA when there is one)."""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print what was done as JSON."""

    def run(self) -> None:
        """Run the command."""
        run = Run.open(self.run_folder)
        refuse_existing(self.out, self.overwrite)
        sampling = self.sampling_config(run.config().sampling)
        with Bar("sampling", "calls") as bar:
            images = sample(
                run,
                self.count,
                seed=self.seed,
                sampling=sampling,
                checkpoint=self.checkpoint,
                label=self.label,
                batch=self.batch,
                device=self.device,
                progress=bar,
            )
        if self.out.suffix == ".png":
            save_png(grid(images), self.out)
        elif self.out.suffix == ".npz":
            save_npz(images, self.out)
        else:
            save_folder(images, self.out, overwrite=self.overwrite)
        if self.json:
            print_json({"out": str(self.out), "count": self.count, "seed": self.seed, "sampling": to_dict(sampling)})
        else:
            print(f"written: {self.out} ({self.count} samples, {sampling.solver}, {sampling.calls} calls)")


@dataclass(kw_only=True)
class Evaluate(SamplerOptions, DataOptions):
    """Compare samples of a run with real images: Fréchet distance, precision and recall, memorisation.

    Pixel features work offline; their numbers are not comparable with Inception FID.

    Examples
      msdiff evaluate runs/digits
      msdiff evaluate runs/digits --data digits --count 2000 --json
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """A trained run."""
    data: str | None = None
    """Data to compare with (default: the run's own, with its own held-out images)."""
    count: int | None = None
    """Samples drawn (default: as many as held-out images, but 500 to 5000)."""
    features: str = "pixels"
    """Feature extractor."""
    seed: int = 0
    """Seed of the samples."""
    checkpoint: str = "best"
    """best, latest or a step."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: CUDA when there is one)."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        run = Run.open(self.run_folder)
        with Bar("evaluating", "calls") as bar:
            result = evaluate(
                run,
                None if self.data is None else self.data_config(self.data),
                count=self.count,
                features=self.features,
                seed=self.seed,
                checkpoint=self.checkpoint,
                sampling=self.sampling_config(run.config().sampling),
                device=self.device,
                progress=bar,
            )
        if self.json:
            print_json(to_dict(result))
        else:
            print(evaluation_text(result))


@dataclass(kw_only=True)
class Describe(SamplerOptions):
    """Show a run's (or preset's) stages, widths, parameters and multiply-adds.

    Examples
      msdiff describe runs/digits
      msdiff describe digits --calls 50 --json
    """

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """A run's folder or a preset's name."""
    json: bool = False
    """Print as JSON."""

    def run(self) -> None:
        """Run the command."""
        path = Path(self.what)
        config = Run.open(path).config() if path.exists() else preset(self.what)
        described = describe(config, self.sampling_config(config.sampling))
        if self.json:
            print_json(described)
        else:
            print(description_table(described))


@dataclass(kw_only=True)
class Report:
    """Write RUN/report.html: one file with stages, network, losses, samples, neighbours, metrics and configuration.

    Examples
      msdiff report runs/digits
    """

    run_folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(name="RUN")]
    """A trained run."""
    checkpoint: str = "best"
    """best, latest or a step: whose samples are shown."""
    count: int = 64
    """Samples shown."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: CUDA when there is one)."""

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
    set: tuple[str, ...] = ()
    """KEY=VALUE ...: changes to the digits preset."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: CUDA when there is one)."""

    def run(self) -> None:
        """Run the command."""
        page, result = demo(
            self.out, parse_changes(self.set), device=self.device, callbacks=[TrainingProgress()], bar=Bar
        )
        print(evaluation_text(result))
        for name, what in (
            ("samples.png", "samples"),
            ("split.png", "stages"),
            (page.name, "report: open in a browser"),
        ):
            print(f"{self.out / name}  ({what})")


COMMANDS: dict[str, type[Any]] = {
    c.__name__.lower(): c for c in (Split, Train, Sample, Evaluate, Describe, Report, Demo)
}


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise ValueError if path exists and may not be replaced."""
    if path.exists() and not overwrite:
        raise ValueError(f"--out {path}: exists; choose another name or give --overwrite")


def parse_changes(settings: Sequence[str]) -> dict[str, Any]:
    """Return {"optimizer.lr": 1e-4} from ["optimizer.lr=1e-4"].

    Raises:
        ValueError: if a setting is not KEY=VALUE with a YAML value.
    """
    changes = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"--set {setting}: must be KEY=VALUE, e.g. optimizer.lr=1e-4")
        try:
            changes[key] = plain_number(yaml.safe_load(value))
        except yaml.YAMLError:
            raise ValueError(f"--set {setting}: {value!r} is not a YAML value") from None
    return changes


def plain_number(value: Any) -> Any:
    """Read 1e-4, which YAML takes for a word, as the number everyone means."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+", value):
        return float(value)
    return value


def load_config(path: Path) -> RunConfig:
    """Read a run configuration from JSON or YAML.

    Raises:
        ValueError: naming the file, the key and the value.
    """
    if path.suffix not in (".yaml", ".yml"):
        data = read_json(path)
    else:
        try:
            data = yaml.safe_load(path.read_text())
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--config {path}: {' '.join(str(error).split())}") from None
    return from_dict(RunConfig, data)


def evaluation_text(result: EvaluationResult) -> str:
    """Return an evaluation in words."""
    return "\n".join(
        (
            f"{result.extractor} features ({result.comparable_to}); {result.count} images a side, mean of {result.splits} draws",
            f"Fréchet distance   {result.frechet:.4g}   (real images: {result.frechet_real:.4g})",
            f"precision, recall  {result.precision:.3f}, {result.recall:.3f}   (real images: {result.precision_real:.3f}, "
            f"{result.recall_real:.3f}; k = {result.k})",
            f"memorised          {100 * result.memorised:.1f} %   (held-out images: {100 * result.memorised_held_out:.1f} %)",
        )
    )


def print_json(value: Any) -> None:
    """Print JSON on standard output."""
    print(json.dumps(value, indent=2))


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit code."""
    arguments = list(sys.argv[1:] if args is None else args)
    if arguments == ["--version"]:
        print(f"msdiff {__version__}")
        return 0
    warnings.showwarning = lambda message, *_: console.print(f"warning: {message}")
    try:
        parse(arguments).run()
    except ValueError as error:
        return _fail(error, 2)
    except (TrainingDiverged, OSError) as error:
        return _fail(error, 1)
    except KeyboardInterrupt as interrupt:
        return _fail(interrupt if interrupt.args else "interrupted", 130)
    return 0


def _fail(message: object, code: int) -> int:
    console.print(
        f"msdiff: {' '.join(str(message).split())}", markup=False, style="red" if console.is_terminal else None
    )
    return code


def parse(arguments: Sequence[str]) -> Any:
    """Parse arguments into a command.

    Raises:
        ValueError: one line that says what is wrong with them.
    """
    apps = {name: Annotated[c, tyro.conf.subcommand(name, description=_help(c))] for name, c in COMMANDS.items()}
    union: Any = None
    for app in apps.values():
        union = app if union is None else union | app
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(
                union,
                prog="msdiff",
                args=arguments,
                description=(__doc__ or "").partition("\n\n")[0],
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(_one_line(errors.getvalue())) from None


def _help(command: type[Any]) -> str:
    return "\n".join(line.removeprefix("    ") for line in (command.__doc__ or "").splitlines())


def _one_line(box: str) -> str:
    """Flatten tyro's boxed error; the box's title repeats what is inside."""
    box = "\n".join(line for line in box.splitlines() if "\u256d" not in line)
    text = re.sub(r"[\u2500-\u257f]+", " ", re.sub(r"\x1b\[[0-9;]*m", "", box))
    text = " ".join(text.split())
    return re.sub(r"For full helptext, (run:?)", r"; for help, run", text)


if __name__ == "__main__":
    sys.exit(main())
