"""msdiff evaluate and msdiff stats: evaluation of a run's samples, statistics of a data set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from ..config.serialization import to_dict
from ..console import Bar
from ..distributed import is_main_process
from ..errors import UserError
from ..evaluation import METRICS, agree
from ..evaluation.features import features_help
from ..evaluation.likelihood import Estimate, LikelihoodResult
from ..evaluation.presentation import result_text
from ..evaluation.reference import KEPT
from ..training.run import Run
from ..workflow.evaluate import NotSavedError, compare, evaluate, statistics
from ..workflow.likelihood import measure_likelihood
from .options import (
    Average,
    DataOptions,
    Device,
    RunFolder,
    SamplerOptions,
    check_out,
    data_option,
    option,
    print_json,
    refuse_own_data,
    say,
)


def features_option(default: str) -> Any:
    """Return the display of an option that takes the name of a feature extractor."""
    return tyro.conf.arg(metavar="FEATURES", help_behavior_hint=f"(default: {default})", help=features_help())


Weights = Annotated[Path | None, option("FILE", "downloaded")]
Metrics = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        metavar="METRIC ...",
        help_behavior_hint="(default: all that can be computed)",
        help=f"Compute these only: {', '.join(METRICS)}.",
    ),
]


@dataclass(kw_only=True)
class Evaluate(SamplerOptions, DataOptions):
    """Compare samples of a run with real images: Fréchet distance, precision and recall, memorisation.

    Pixel features need no download. Their values are not comparable with the Inception FID, which --features inception
    --against train computes (extra: eval). The result is added to RUN/evaluation.json; msdiff report shows it.

    Examples
      msdiff evaluate runs/digits
      msdiff evaluate runs/digits --data digits --count 2000 --json
      msdiff evaluate runs/cifar --features inception --against train --count 50000
      msdiff evaluate runs/cifar --features inception --inception-weights weights.pth --against cifar10-32x32.npz
      msdiff evaluate runs/digits --likelihood
    """

    run_folder: RunFolder
    """A trained run's folder."""
    data: Annotated[str | None, option("DATA", "the run's, with its own held-out images")] = None
    """Other images to compare with; options that are not given are the run's."""
    against: Annotated[str, option("{held-out,train,FILE}", "held-out")] = "held-out"
    """held-out: as many held-out images. train: statistics of all training images, as in published FIDs. FILE: statistics
    written by msdiff stats, or a batch of images (.npz), such as ADM's."""
    count: Annotated[
        int | None, option("INT", "as many as the real images, from 500 to 5000, with statistics to 50000")
    ] = None
    """Number of samples; with --likelihood: of held-out images (default: all)."""
    likelihood: bool = False
    """Compute the variational bound of held-out images instead, in bits per dimension, per stage (RUN/likelihood.json)."""
    sigma_range: Annotated[tuple[float, float] | None, option("LOW HIGH", "the run's training noise")] = None
    """With --likelihood: range of sigma of the integral; only results of the same range are comparable."""
    features: Annotated[str | None, features_option("the run's evaluation.features")] = None
    inception_weights: Weights = None
    """A file with the weights of inception or vgg16."""
    metrics: Metrics = ()
    seed: int = 0
    """Seed of the samples."""
    checkpoint: str = "best"
    """best, latest or a step."""
    ema: Average = None
    """Width of another average of the weights, computed from the snapshots of a run with training.ema_profiles."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        run = Run.open(self.run_folder)
        if self.likelihood:
            self._measure_likelihood(run)
            return
        if self.sigma_range is not None:
            low, high = self.sigma_range
            raise UserError(f"--sigma-range {low:g} {high:g} needs --likelihood; add it, or leave out --sigma-range")
        config, given = run.config(), self.given()
        if self.features is not None:
            agree(self.features)
        if given and self.data is None:
            raise UserError(
                f"--{next(iter(given)).replace('_', '-')} needs --data, or leave it out: the run's own data are read as in "
                "training"
            )
        data = None
        if self.data is not None:
            data = dataclasses.replace(config.data, source=self.data, fingerprint="", shape=(), **given)
        chosen: dict[str, Any] = {
            "count": self.count,
            "features": self.features,
            "weights": self.inception_weights,
            "metrics": self.metrics,
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "ema": self.ema,
            "sampling": self.sampling_config(config.sampling),
            "device": self.device,
        }
        not_saved: NotSavedError | None = None
        with Bar("evaluating", "images") as bar:
            try:
                if self.against == "held-out":
                    result = evaluate(run, data, **chosen, progress=bar)
                else:
                    result = compare(run, self.against, data, **chosen, progress=bar)
            except NotSavedError as error:
                result, not_saved = error.result, error
        if not is_main_process():
            return
        if self.json:
            print_json(to_dict(result))
        else:
            say(result_text(result))
        if not_saved is not None:
            raise not_saved

    def _measure_likelihood(self, run: Run) -> None:
        if self.data is not None or self.against != "held-out":
            raise UserError("--likelihood reads the run's own held-out images; leave out --data and --against")
        sampler = [f.name for f in dataclasses.fields(SamplerOptions) if getattr(self, f.name) is not None]
        others = [
            name
            for name in ("features", "inception_weights", "metrics")
            if getattr(self, name) != getattr(Evaluate, name)
        ]
        if unused := [*sampler, *self.given(), *others]:
            raise UserError(f"--{unused[0].replace('_', '-')} has no effect with --likelihood; leave it out")
        low, high = self.sigma_range or (None, None)
        with Bar("computing", "images") as bar:
            result = measure_likelihood(
                run,
                count=self.count,
                seed=self.seed,
                sigma_min=low,
                sigma_max=high,
                checkpoint=self.checkpoint,
                ema=self.ema,
                device=self.device,
                progress=bar,
            )
        if self.json:
            print_json(to_dict(result))
        else:
            say(likelihood_text(result))


@dataclass(kw_only=True)
class Stats(DataOptions):
    """Write the statistics of a data set's features, for reuse in many evaluations.

    msdiff evaluate --against FILE and evaluation.reference=FILE read them; both need the same images and features.

    Examples
      msdiff stats digits --out digits.npz
      msdiff stats VIRTUAL_imagenet64_labeled.npz --features inception --out imagenet64.npz
      msdiff stats cifar10:data/ --features inception --part all --out cifar10.npz
    """

    data: Annotated[Positional[str], data_option()]
    out: Annotated[Path, option("FILE")]
    """Where to write the statistics (.npz)."""
    features: Annotated[str, features_option("pixels")] = "pixels"
    inception_weights: Weights = None
    """A file with the weights of inception or vgg16."""
    part: Annotated[
        Literal["all", "train", "held-out"] | None, option("{all,train,held-out}", "train; all of an .npz file")
    ] = None
    """Part of the data set. Published statistics are of all images of a data set's training split."""
    keep: Annotated[int | None, option("INT", f"{KEPT}; all of an .npz file")] = None
    """Number of images whose features are kept as well, for metrics that need features, such as precision and recall."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> None:
        """Run the command."""
        if self.out.suffix != ".npz":
            raise UserError(f"--out {self.out}: must end in .npz; name it {self.out.with_suffix('.npz')}")
        check_out(self.out, self.overwrite)
        refuse_own_data(self.out, self.data)
        agree(self.features)
        config = self.described(self.data)
        with Bar("extracting", "images") as bar:
            reference = statistics(
                config,
                self.out,
                features=self.features,
                weights=self.inception_weights,
                part=self.part,
                keep=self.keep,
                device=self.device,
                progress=bar,
            )
        kept = 0 if reference.features is None else len(reference.features)
        say(
            f"written: {self.out} ({reference.moments.count} images, {len(reference.moments.mean)} dimensions of "
            f"{reference.extractor}, features of {kept} kept)"
        )


def likelihood_text(result: LikelihoodResult) -> str:
    """Return the variational bound as text, each term on its own line."""

    def line(name: str, estimate: Estimate) -> str:
        return f"{name:<34}{estimate.mean:9.4f} ± {estimate.error:.4f}"

    stages = [
        line(f"stage {k}  sigma {low:.4g} to {high:.4g}", estimate)
        for k, (low, high), estimate in zip(result.numbers, result.intervals, result.stages, strict=True)
    ]
    rest = [line("prior", result.prior)]
    if result.reconstruction is not None:
        rest.append(line("reconstruction", result.reconstruction))
    return "\n".join(
        [
            f"variational bound of {result.rows} held-out images in {result.unit}, {result.draws} noise levels per image and "
            "stage",
            *stages,
            line("all stages", result.diffusion),
            *rest,
            line("total", result.total),
        ]
    )
