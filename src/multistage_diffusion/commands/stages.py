"""The command that finds stages."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from ..config import CodecConfig, DataConfig
from ..config.image_presets import fitting_preset
from ..config.presets import PRESETS, preset
from ..config.serialization import override
from ..console import Bar
from ..conventions import Boundary, boundary, boundary_lines
from ..data.sources import open_data
from ..distributed import is_main_process
from ..errors import UserError
from ..escaping import counted
from ..performance.devices import resolve_device
from ..reporting.describe import training_table
from ..schedules import SCHEDULES, LogNormal, SigmaPrior
from ..shares import prior_masses
from ..stage_finding import StageResult, StageSettings
from ..stage_finding.settings import StageDenoiser
from ..training.run import Run
from ..workflow.auto_from import data_like
from ..workflow.checks import LEAST_SHARE
from ..workflow.clustering import find_stages_by_gradients
from ..workflow.latent import codec_like
from ..workflow.stages import curves_file, find_stages
from .boundary import boundary_json
from .options import DataOptions, Device, check_out, data_option, one_of, option, print_json, say

_DEFAULTS = StageSettings()


@dataclass(kw_only=True)
class FindStages(DataOptions):
    """Find the noise ranges (stages) of a data set from the data themselves.

    Writes the stages to OUT (JSON) and their curves to a PNG of the same name. The processes of torchrun (with -m
    multistage_diffusion stages ...) share the work; the result does not depend on their number.

    Examples
      msdiff stages digits --out stages.json
      msdiff stages digits --precision 0.005 --out precise.json
      msdiff stages photos/ --size 64 64 --fit crop --algorithm 2 --stages 4 --out stages.json
      msdiff stages photos/ --size 64 64 --fit crop --denoiser gaussian --out stages.json
      msdiff stages digits --data-range 0 1 --json
      msdiff stages --algorithm gradient --run runs/one-stage --stages 3 --out gradient.json
      msdiff stages photos/ --run runs/imported --codec hf:stabilityai/sd-vae-ft-mse --out stages.json
    """

    data: Annotated[Positional[str], data_option("none with --algorithm gradient")] = ""
    out: Path = Path("stages.json")
    """File of the result."""
    algorithm: Annotated[
        Literal[1, 2, "timestep", "snr", "gradient"] | None,
        option("{1,2,timestep,snr,gradient}", "1; 2 with --denoiser gaussian"),
    ] = None
    """1: three stages by similarity to the limits; 2: any number by clustering; timestep, snr, gradient: baselines."""
    denoiser: StageDenoiser = _DEFAULTS.denoiser
    """optimal: that of the images, as published; gaussian: that of their mean and covariance, which generalises."""
    preset: Annotated[str | None, option("NAME", "the run's; else EDM's: ln sigma normal, mean -1.2, std 1.2")] = None
    """Whose training density and preconditioning are used (denoiser gaussian)."""
    trained: Annotated[Path | None, tyro.conf.arg(name="run", metavar="RUN")] = None
    """The run whose gradients are compared (algorithm gradient), instead of DATA; with DATA: the run that train --init-from
    starts from: its image size, training density, and scale and shift of its latents, in which the stages of DATA are found."""
    density: Literal["given", "auto"] = _DEFAULTS.density
    """given: the training density of --preset or --run; auto: the one proposed from the images (denoiser gaussian)."""
    stages: int = _DEFAULTS.stages
    """Number of stages (all but algorithm 1)."""
    samples: Annotated[
        int | None, option("INT", "1000; with --precision as many as it takes; 4096 with --denoiser gaussian")
    ] = None
    """Noisy images that are compared; with --denoiser gaussian images whose covariance is measured."""
    times: int = _DEFAULTS.times
    """Times per noisy image (algorithm 1); 1 with 50000 samples is the paper's estimator."""
    nodes: int = _DEFAULTS.nodes
    """Times among which algorithm 2 chooses its edges, evenly spaced; 21 is the published grid."""
    precision: Annotated[float | None, option("FLOAT", "that of the number of samples")] = None
    """Draw samples until the 95 % intervals of the edges end at most this far from them, in t."""
    eta: float = _DEFAULTS.eta
    """Largest difference of a coordinate that counts as agreement."""
    alpha: float = _DEFAULTS.alpha
    """Least similarity within the outer stages (algorithm 1)."""
    rule: Literal["interval-mean", "pointwise"] = _DEFAULTS.rule
    """How the edges follow from the curves (algorithm 1)."""
    space: Annotated[Literal["eps", "x0"] | None, option("{eps,x0}", "eps, or x0 for algorithm 2")] = None
    """Compared quantity: noise predictions or posterior means."""
    objective: Literal["total-distance", "mean-similarity"] = _DEFAULTS.objective
    """Objective of algorithm 2."""
    data_range: Annotated[tuple[float, float], tyro.conf.arg(metavar="LOW HIGH")] = (-1.0, 1.0)
    """Range of the pixels, by default that of training; 0 1 reproduces the paper."""
    codec: Annotated[str | None, option("CODEC", "pixels")] = None
    """Find the stages in the latents of this autoencoder: a folder or hf:NAME."""
    schedule: Annotated[str, tyro.conf.arg(metavar=one_of(SCHEDULES))] = "vp"
    """Noise schedule in whose time the edges are printed."""
    shift: Annotated[float | None, option("FLOAT", "not printed")] = None
    """Print each edge in the conventions of two-expert trainers, too, with this shift of rectified flow (see msdiff boundary)."""
    seed: int = _DEFAULTS.seed
    """Seed of the samples."""
    memory: float = 2.0
    """Approximate limit of memory in GiB; images beyond it are read several times."""
    image_shards: int = 1
    """Processes of torchrun among which the images are divided; the groups of processes divide the samples."""
    device: Device = None
    """cpu, cuda or cuda:N"""
    overwrite: bool = False
    """Replace OUT if it exists."""
    json: bool = False
    """Print the result as JSON."""

    def run(self) -> None:
        """Run the command."""
        names = [f.name for f in dataclasses.fields(StageSettings)]
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        values["algorithm"] = self.algorithm or (2 if self.denoiser == "gaussian" else _DEFAULTS.algorithm)
        settings = StageSettings(**values)
        if self.preset is not None and self.denoiser != "gaussian":
            raise UserError(
                "--preset: only denoiser gaussian uses a training density; give --denoiser gaussian, too, or leave it out"
            )
        if self.schedule not in SCHEDULES:
            raise UserError(f"--schedule {self.schedule}: must be one of {', '.join(SCHEDULES)}")
        if self.shift is not None:
            boundary(1.0, shift=self.shift)  # refuses an impossible shift before the work
        picture = self.out.with_suffix(".png")
        if self.out == picture:
            raise UserError(f"--out {self.out}: the result is JSON; name it {self.out.with_suffix('.json')}")
        for path in (self.out, picture, curves_file(self.out)):
            check_out(path, self.overwrite)
        gradients = settings.algorithm == "gradient"
        if gradients and self.trained is None:
            raise UserError("--algorithm gradient compares the gradients of a trained run; give --run RUN, too")
        if bool(self.data) == gradients:
            raise UserError(
                "Missing from msdiff stages: DATA, the images (or --run RUN with --algorithm gradient)"
                if not self.data
                else "DATA: the run's images are used; leave it out"
            )
        if not 0 < self.memory < math.inf:
            raise UserError(f"--memory {self.memory}: must be positive and finite, in GiB")
        with Bar("finding stages", self._unit()) as bar:
            where: dict[str, Any] = {
                "schedule": SCHEDULES[self.schedule](),
                "out": self.out,
                "device": self.device,
                "memory": self.memory,
                "progress": bar if is_main_process() else None,
            }
            trained = None if self.trained is None else Run.open(self.trained).config().diffusion
            if gradients:
                assert self.trained is not None
                result = find_stages_by_gradients(self.trained, settings, **where)
            else:
                config, codec = self._input()
                diffusion = trained if self.preset is None else preset(self.preset).diffusion
                result = find_stages(
                    config, settings, diffusion=diffusion, codec=codec, image_shards=self.image_shards, **where
                )
        if not is_main_process():
            return
        if self.json:
            print_json(result.to_dict() | self._conventions(result))
        else:
            training = "" if gradients else self._training(result, config)
            say(edges_text(result, training, None if trained is None else trained.prior))
            for k, found in enumerate(self._boundaries(result), start=1):
                say("\n".join([f"stage {k} | {k + 1} in other conventions:", *boundary_lines(found)]))
            say(f"written: {self.out}, {picture}")

    def _input(self) -> tuple[DataConfig, CodecConfig | None]:
        """Return how DATA are read, and the codec: those of --run, as far as options do not say otherwise."""
        if self.trained is None:
            return self.described(self.data), None if self.codec is None else CodecConfig(source=self.codec)
        config = Run.open(self.trained).config()
        if self.codec is not None and not config.codec.used:
            raise UserError(f"--codec {self.codec}: the network of {self.trained} is on pixels; leave it out")
        data = override(data_like(config.data, self.data), self.given())
        return data, codec_like(config.codec, self.codec) if config.codec.used else None

    def _training(self, result: StageResult, data: DataConfig) -> str:
        """Return what each stage would get of a training on pixels with these stages; else nothing."""
        if result.data_range != (-1.0, 1.0) or self.trained is not None:  # with --run, of a network that is there
            return ""
        images = open_data(  # says nothing: its line is printed already
            data.source, size=data.size, fit=data.fit, skip_bad=data.skip_bad, max_pixels=data.max_pixels
        )
        kind = "gpu" if resolve_device(self.device).type == "cuda" else "cpu"
        known = data.source if data.source in PRESETS else fitting_preset(max(images.shape[1:]), kind)
        base = preset(self.preset or known)
        if base.codec.used:
            return ""
        keys: dict[str, Any] = {"stages": result.stages(), "data.shape": images.shape}
        if len(base.stages) != len(result.stages()):
            decoders = base.network.largest_decoders(len(result.stages()))
            keys |= {f"network.{name}": value for name, value in decoders.items()} | {"training.shares": "prior"}
        config = override(base, keys)
        return f"training with preset {base.name}:\n{training_table(config)}"

    def _boundaries(self, result: StageResult) -> list[Boundary]:
        """Return the edges as boundaries, if --shift asks for them."""
        if self.shift is None:
            return []
        return [boundary(sigma, shift=self.shift) for sigma in result.edges_sigma]

    def _conventions(self, result: StageResult) -> dict[str, Any]:
        """Return what --shift adds to the JSON."""
        return {} if self.shift is None else {"boundaries": [boundary_json(b) for b in self._boundaries(result)]}

    def _unit(self) -> str:
        """Return what the progress bar counts."""
        if self.denoiser == "gaussian":
            return "resamples"
        return "gradients" if self.algorithm == "gradient" else "samples"


def _shares(result: StageResult, trained: SigmaPrior | None) -> str:
    """Return the share of the training noise in each stage as text: of the density of the stages, else the run's, else EDM's."""
    if result.diffusion is not None:
        noise, prior = "the training noise", result.diffusion.prior
    elif trained is not None:
        noise, prior = "the run's training noise", trained
    else:
        prior = LogNormal()
        noise = f"EDM's training noise (ln sigma {LogNormal().p_mean:g} ± {LogNormal().p_std:g})"
    masses = prior_masses(result.stages(), prior)
    text = f"share of {noise} in each stage: " + ", ".join(f"{share:.1%}" for share in masses)
    starved = f"; below {LEAST_SHARE:.0%} a stage hardly trains (training.floor_share gives it rows)"
    return text + (starved if min(masses) < LEAST_SHARE else "")


def edges_text(result: StageResult, training: str = "", trained: SigmaPrior | None = None) -> str:
    """Return the edges found as text.

    Args:
        result: of the stage finding.
        training: what each stage would get of a training, as text; empty: only the shares of the noise are told.
        trained: the training density of the run that the stages are for; None: that of the result, or EDM's.
    """
    lines = []
    for k, (t, sigma) in enumerate(zip(result.edges_t, result.edges_sigma, strict=True)):
        line = f"stage {k + 1} | {k + 2}: t = {t:.4f}, sigma = {sigma:.4f}"
        if result.intervals_t:
            (low, high), (least, most) = result.intervals_t[k], result.intervals_sigma[k]
            line += f" (95 %: t {low:.4f} to {high:.4f}, sigma {least:.4f} to {most:.4f})"
        lines.append(line)
    in_units_of_training = result.diffusion is not None or result.data_range in (None, (-1.0, 1.0))
    if in_units_of_training and not training:
        lines.append(_shares(result, trained))
    if result.diffusion is not None:
        half = ", ".join(f"{sigma:.4f}" for sigma in result.curves["half_edges_sigma"])
        if result.curves["proposed_density"]:
            mean, std = result.curves["proposed_density"]
            lines.append(
                f"density proposed by the images: ln sigma of mean {mean:g} and standard deviation {std:g} "
                f"(train --set diffusion.prior.p_mean={mean:g} diffusion.prior.p_std={std:g})"
            )
        lines.append(
            f"measured on {counted(result.samples, 'image')} that are not held out; as a check, half of them give sigma = {half}"
        )
    table = result.curves.get("table", [])
    if table:
        what = "mean distance within a stage" if result.diffusion is None else "mean squared distance within a stage"
        outside = "" if table[0]["distance_held_out"] is None else " (held-out images)"
        heading = f"{what}{outside}"
        lines.append(f"stages  {heading:<44}  edges in t")
    for row in table:
        outside = row["distance_held_out"]
        distance = f"{row['distance']:.4f}" + ("" if outside is None else f" ({outside:.4f})")
        lines.append(f"{row['stages']:6d}  {distance:<44}  {', '.join(f'{t:.4g}' for t in row['edges_t'])}".rstrip())
    return "\n".join([*lines, *filter(None, [training])])
