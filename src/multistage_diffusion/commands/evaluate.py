"""Commands that measure: evaluation of a run's samples, statistics of a data set."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional

from ..config import DataConfig
from ..config.serialization import to_dict
from ..console import Bar
from ..distributed import is_main_process
from ..errors import UserError
from ..evaluation import ComparisonResult, EvaluationResult, agree
from ..evaluation.likelihood import Estimate, LikelihoodResult
from ..training.run import Run
from ..workflow.evaluate import KEPT, NotKeptError, compare, evaluate, statistics
from ..workflow.likelihood import measure_likelihood
from .options import (
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

Features = Annotated[str, option("FEATURES", "pixels")]


Weights = Annotated[Path | None, option("FILE", "downloaded")]


@dataclass(kw_only=True)
class Evaluate(SamplerOptions, DataOptions):
    """Compare samples of a run with real images: Fréchet distance, precision and recall, memorisation.

    Pixel features work offline; their numbers are not comparable with Inception FID, which --features inception --against
    train gives (extra: eval). The result is added to RUN/evaluation.json and shown by msdiff report.

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
    """Other images to compare with, read as the run's unless said otherwise."""
    against: Annotated[str, option("{held-out,train,FILE}", "held-out")] = "held-out"
    """Held-out images, equally many; or statistics, as in published FIDs: of all training images, or a file (msdiff stats)."""
    count: Annotated[
        int | None, option("INT", "as many as the real images, but 500 to 5000, or 50000 by statistics")
    ] = None
    """Samples drawn; with --likelihood held-out images measured (default: all)."""
    likelihood: bool = False
    """Measure the variational bound of held-out images instead, in bits per dimension of each stage; see RUN/likelihood.json."""
    sigma_range: Annotated[tuple[float, float] | None, option("LOW HIGH", "the run's training noise")] = None
    """With --likelihood: noise from and to which it is taken; compare runs on the same range only."""
    features: Features = "pixels"
    """pixels, fashion-classifier, inception, vgg16, dinov2, or a TorchScript file: that is code, name only one you trust."""
    inception_weights: Weights = None
    """A file of the weights of inception (or of vgg16)."""
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
        if self.likelihood:
            self._measure_likelihood(run)
            return
        if self.sigma_range is not None:
            raise UserError("--sigma-range is of --likelihood; give both or neither")
        config, given = run.config(), self.given()
        agree(self.features)
        if given and self.data is None:
            raise UserError(
                f"--{next(iter(given)).replace('_', '-')} needs --data: the run's own data are read as before"
            )
        data = None
        if self.data is not None:
            data = dataclasses.replace(config.data, source=self.data, fingerprint="", shape=(), **given)
        chosen: dict[str, Any] = {
            "count": self.count,
            "features": self.features,
            "weights": self.inception_weights,
            "seed": self.seed,
            "checkpoint": self.checkpoint,
            "sampling": self.sampling_config(config.sampling),
            "device": self.device,
        }
        result: EvaluationResult | ComparisonResult
        lost: NotKeptError | None = None
        with Bar("evaluating") as bar:
            try:
                if self.against == "held-out":
                    result = evaluate(run, data, **chosen, progress=bar)
                else:
                    result = compare(run, self.against, data, **chosen, progress=bar)
            except NotKeptError as error:
                result, lost = error.result, error
        if not is_main_process():
            return
        if self.json:
            print_json(to_dict(result))
        else:
            say(evaluation_text(result) if isinstance(result, EvaluationResult) else comparison_text(result))
        if lost is not None:
            raise lost

    def _measure_likelihood(self, run: Run) -> None:
        if self.data is not None or self.against != "held-out":
            raise UserError("--likelihood is of the run's own held-out images; leave out --data and --against")
        sampler = [f.name for f in dataclasses.fields(SamplerOptions) if getattr(self, f.name) is not None]
        others = [name for name in ("features", "inception_weights") if getattr(self, name) != getattr(Evaluate, name)]
        if idle := [*sampler, *self.given(), *others]:
            raise UserError(f"--{idle[0].replace('_', '-')}: --likelihood draws no samples; leave it out")
        low, high = self.sigma_range or (None, None)
        with Bar("measuring", "images") as bar:
            result = measure_likelihood(
                run,
                count=self.count,
                seed=self.seed,
                sigma_min=low,
                sigma_max=high,
                checkpoint=self.checkpoint,
                device=self.device,
                progress=bar,
            )
        if self.json:
            print_json(to_dict(result))
        else:
            say(likelihood_text(result))


@dataclass(kw_only=True)
class Stats(DataOptions):
    """Write the statistics of a data set's features, once for many evaluations.

    msdiff evaluate --against and evaluation.reference take the file, and refuse it for other images or features.

    Examples
      msdiff stats digits --out digits.npz
      msdiff stats cifar10:data/ --features inception --part all --out cifar10.npz
    """

    data: Annotated[Positional[str], data_option()]
    out: Annotated[Path, option("FILE")]
    """Where to write the statistics (.npz)."""
    features: Features = "pixels"
    """pixels, fashion-classifier, inception, vgg16, dinov2, or a TorchScript file: that is code, name only one you trust."""
    inception_weights: Weights = None
    """A file of the weights of inception (or of vgg16)."""
    part: Literal["all", "train", "held-out"] = "train"
    """Which images; published statistics are of all training images that a data set comes with."""
    keep: int = KEPT
    """Images whose features are kept, too, for precision, recall and KID."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    overwrite: bool = False
    """Replace OUT if it exists."""

    def run(self) -> None:
        """Run the command."""
        if self.out.suffix != ".npz":
            raise UserError(f"--out {self.out}: statistics are an .npz file; name it {self.out.with_suffix('.npz')}")
        check_out(self.out, self.overwrite)
        refuse_own_data(self.out, self.data)
        agree(self.features)
        config = DataConfig(source=self.data, **self.given())
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


def evaluation_text(result: EvaluationResult) -> str:
    """Return an evaluation as text."""
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


def comparison_text(result: ComparisonResult) -> str:
    """Return a comparison with reference statistics as text."""
    few = (
        "; no more samples than dimensions: compare only with figures of equal counts" if result.rank_deficient else ""
    )
    of = f"{result.reference_count} images: " if result.reference_count else ""
    lines = [
        f"{result.extractor} features ({result.comparable_to})",
        f"{result.samples} samples against {of}{result.reference}{few}",
        f"Fréchet distance   {result.frechet:.4g}",
    ]
    if result.kid is not None:
        lines.append(
            f"kernel distance    {result.kid:.4g} ± {result.kid_deviation:.2g}   (KID; 100 subsets of {result.kid_subset})"
        )
    if result.inception_score is not None:
        lines.append(
            f"classifier score   {result.inception_score:.4g} ± {result.inception_deviation:.2g}   (the Inception score of "
            f"these features' classifier; {result.inception_splits} parts)"
        )
    if result.precision is not None:
        lines.append(
            f"precision, recall  {result.precision:.3f}, {result.recall:.3f}   (k = {result.k}; {result.neighbour_count} a side)"
        )
    return "\n".join(lines)


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
            f"variational bound of {result.rows} held-out images in {result.unit}, {result.draws} noise levels a stage each",
            *stages,
            line("all stages", result.diffusion),
            *rest,
            line("total", result.total),
        ]
    )
