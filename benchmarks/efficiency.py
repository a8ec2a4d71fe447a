"""Samples per unit of training compute: one shared network, separate networks, and several decoders on one encoder.

    python benchmarks/efficiency.py [--setting 16] [--phase final] [--arms a b c d] [--seeds 21 22 23] [--jobs 2]
    python benchmarks/efficiency.py --setting V --sampling      # of runs that are done: distance by the cost of sampling
    python benchmarks/efficiency.py --report        # what is known so far: the ratio, its interval, the curves

Four networks that cost equally much per training image, within 3 %, are trained on the same images, rows and noise:

    a  one network for all noise              b  a network of its own for every stage of `msdiff stages`
    c  several decoders on one encoder, stages of `msdiff stages`        d  the same network, stages of even length in time

and beside them, to see what comes from the decoders and what from the rows that each stage is given,

    e  one network for all noise, trained on the rows of (c)
    f  several decoders of one width (setting V, where those of (c) are tailored to their stages)

and a transformer of the same cost (setting T)

    u  U-ViT, one decoder                    v  U-ViT, decoders of several widths and depths, stages and rows of (c)

Settings: 16 and 32 (pixels a side; EDM's preconditioning and density), and two with networks of width 16 at 16x16 pixels:
V, the paper's own setting in small: NCSN++ with noise prediction, VP, times drawn evenly, decoders of 24, 16 and 4 channels;
E, the strong baseline: EDM's preconditioning and density; decoders, stages and rows of V;
T, transformers: (a) and (c) of V, half as long, beside (u) and (v); (a) and (c) are V's runs up to there, bit for bit;
levers: what is tried to make (c) of V better, for half of its steps, on V's seed 21: to be read beside V's (c) with that seed;
B, branching: (a) of setting V is trained on, and (c) and (f) start from it, all with a new optimiser (--init-from);
edges, the pilot of which stages to prefer: as E with EDM's density; decoders of one width, so that only the edges differ: (c) of
the Gaussian denoiser, (o) of the optimal denoiser, (d) of even length in time; --phase tuning adds variants of them.

The Fréchet distance of 5,000 samples to the training images, on the features of the classifier that ships with the package,
is taken at evaluation points fixed beforehand. The ratio is the compute at which (c) first reaches the best distance of
(a), divided by the compute at which (a) reached it: paired by seed, its mean and interval taken in logarithms.

Every run is a folder below --folder, made by the library as `msdiff train` makes it; a run that was cut short goes on, one that
is done is read. Results are kept in benchmarks/results/efficiency-SETTING.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import platform
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from multistage_diffusion import compare, find_stages, override, preset, resume, rng, train
from multistage_diffusion import statistics as statistics_of
from multistage_diffusion.config import DataConfig, NetworkConfig, RunConfig
from multistage_diffusion.config.serialization import read_json, to_dict
from multistage_diffusion.contracts import Denoiser
from multistage_diffusion.data import to_float
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.files import write_json
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.reporting.describe import sampling_flops
from multistage_diffusion.shares import row_counts, stage_shares, stage_weights
from multistage_diffusion.stage_finding import StageSettings
from multistage_diffusion.stages import Stages
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.checkpoint import checkpoint_step, list_checkpoints
from multistage_diffusion.training.flops import flops_per_image
from multistage_diffusion.training.losses import objective, stage_losses
from multistage_diffusion.training.run import Run

RESULTS = Path(__file__).parent / "results"
START = "start from"  # (setting, arm) whose run of the same seed the run starts from
BRANCH = "branch at"  # share of a run's steps in which all stages train one decoder (training.branch_at)
SPLIT = "split"  # which of a setting's splits gives the stages
CALLS = (8, 10, 14, 20, 29)  # of the denoiser per image, at which the cost of sampling is measured
TOLERANCE = 0.03  # of the arms' compute per image
SIGMAS = (0.05, 0.1, 0.2, 0.35, 0.6, 0.85, 1.2, 1.8, 2.5, 4.0, 8.0, 16.0)  # at which denoising errors are compared
HELD_OUT_IMAGES = 1000  # held-out images of which they are the mean
# Two-sided 97.5 % points of Student's t for 1, 2, ... degrees of freedom
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
ARMS = {
    "a": "one network",
    "b": "separate networks",
    "c": "several decoders, split",
    "d": "several decoders, even",
    "e": "one network, rows of (c)",
    "f": "several decoders, one width",
    "n": "several decoders, even, narrow at high noise",
    "o": "several decoders, optimal denoiser's stages",
    "u": "U-ViT, one decoder",
    "v": "U-ViT, several decoders",
}
ONE = ("a", "u")  # arms of one decoder for all noise
CHEAPER = ("n",)  # arms that may cost less than the others
COLOURS = {
    "n": "#000000",
    "o": "#8172b3",
    "a": "#444444",
    "b": "#c44e52",
    "c": "#1f77b4",
    "d": "#dd8452",
    "e": "#8c8c8c",
    "f": "#55a868",
    "u": "#937860",
    "v": "#17a2b8",
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms have in common; fixed before the final runs.

    Attributes:
        size: pixels a side.
        preset: the preset that all arms start from.
        base: keys changed in it.
        splits: how (b)'s and (c)'s stages may be found.
        variants: of each arm, what is tried on the tuning seed: equally many for all (V's second of (c) is no candidate).
        chosen: of each arm, the variant with the lowest distance at the end of its tuning run.
        steps: of a run, by phase.
        tuning_seed: of the tuning runs.
    """

    size: int
    preset: str = "digits"
    base: Mapping[str, Any]
    splits: Mapping[str, StageSettings]
    variants: Mapping[str, Sequence[Mapping[str, Any]]]
    chosen: Mapping[str, int]
    steps: Mapping[str, int]
    tuning_seed: int = 1

    @property
    def arms(self) -> list[str]:
        """The arms that this setting has; (e) goes with (c)."""
        return [arm for arm in ARMS if arm in self.variants or (arm == "e" and "c" in self.variants)]

    def changes(self, arm: str, variant: int) -> dict[str, Any]:
        """Return what a variant of an arm changes; (e)'s are (c)'s unless given, but its stages never part."""
        if arm == "e" and arm not in self.variants:
            return {**self.variants["c"][variant], BRANCH: 1.0}
        return dict(self.variants[arm][variant])

    def choice(self, arm: str) -> int | None:
        """Return the variant of an arm's final runs, None before there is one."""
        return self.chosen.get("c" if arm == "e" and arm not in self.chosen else arm)


def _small_networks(**changes: Any) -> dict[str, Any]:
    """Return what settings V and E have in common, with changes."""
    return {
        "network.channels": 1,
        "network.encoder_width": 16,
        "network.decoder_widths": [16, 16, 16],
        "network.channel_mult": [1, 2],
        "network.blocks_per_level": 1,
        "network.norm_groups": 16,
        "network.dropout": 0.0,
        "optimizer.lr": 4e-3,
        "optimizer.warmup_steps": 200,
        "training.batch": 128,
        "training.flip": False,
        "training.update_mode": "mixed",
        "training.ema_halflife": 50_000.0,
        "training.ema_rampup": 0.05,
        "training.held_out_every": 512,
        "training.held_out_rows": 512,
        "training.checkpoint_every": 256,
        "training.log_every": 128,
        "training.sample_every": 0,
        "evaluation.every": 1024,
        "evaluation.features": "fashion-classifier",
        "evaluation.count": 5000,
        **changes,
    }


def _transformer(widths: Sequence[int], depths: Sequence[int], lr: float) -> dict[str, Any]:
    """Return what a U-ViT of setting V's cost changes, with decoders of these widths and depths."""
    network = NetworkConfig.of(
        "uvit",
        channels=1,
        patch=2,
        encoder_width=64,
        decoder_widths=tuple(widths),
        encoder_depth=2,
        decoder_depths=tuple(depths),
        head_channels=16,
        size=(16, 16),
        init_std=0.09,
    )
    return {"network": network, "optimizer.lr": lr}


@dataclass(frozen=True, kw_only=True)
class Cuts:
    """Stage edges in sigma: of `msdiff stages`, and of even length in the time of the VP kernel."""

    splits: Mapping[str, tuple[float, ...]]
    even: tuple[float, ...]

    @classmethod
    def of(cls, setting: Setting) -> Cuts:
        data = data_config(setting.size)
        found = {name: find_stages(data, settings).edges_sigma for name, settings in setting.splits.items()}
        even = find_stages(data, StageSettings(algorithm="timestep", stages=3))
        return cls(splits=found, even=even.edges_sigma)


SIGMA_DATA_16 = 0.55  # standard deviation of the 16x16 images about their mean image
V_SHARES = (0.32, 0.34, 0.34)  # with which (c)'s rows cost as much as (a)'s
SETTINGS = {
    "16": Setting(
        size=16,
        base={
            "network.encoder_width": 4,
            "network.channel_mult": [1, 2],
            "network.blocks_per_level": 1,
            "network.dropout": 0.0,
            "network.decoder_widths": [4, 4, 4],
            "diffusion.sigma_data": 0.67,
            "diffusion.prior.p_mean": -0.7,
            "diffusion.prior.p_std": 1.0,
            "optimizer.lr": 8e-3,
            "optimizer.warmup_steps": 200,
            "optimizer.decay_after": 500,
            "training.batch": 96,
            "training.ema_rampup": 0.1,
            "training.held_out_every": 1000,
            "training.checkpoint_every": 1000,
            "training.sample_every": 0,
            "sampling.solver": "dpm++",
            "sampling.method": "multistep",
            "sampling.order": 2,
            "sampling.calls": 10,
            "evaluation.every": 1000,
            "evaluation.features": "fashion-classifier",
            "evaluation.count": 5000,
        },
        splits={
            "algorithm 1": StageSettings(),
            "algorithm 2": StageSettings(algorithm=2, stages=3),
        },
        variants={
            "a": (
                {},
                {"optimizer.lr": 5e-3},
                {"diffusion.prior.p_mean": -0.8},
            ),
            "b": (
                {SPLIT: "algorithm 1", "training.shares": [0.62, 0.35, 0.03], "training.overlap": 0.5, BRANCH: 0.25},
                {SPLIT: "algorithm 2", "training.shares": [0.78, 0.20, 0.02], "training.overlap": 0.5, BRANCH: 0.25},
                {SPLIT: "algorithm 1", "training.shares": [0.70, 0.29, 0.01], "training.overlap": 0.25, BRANCH: 0.25},
            ),
            "c": (
                {SPLIT: "algorithm 1", "training.shares": [0.62, 0.35, 0.03], "training.overlap": 0.5, BRANCH: 0.25},
                {SPLIT: "algorithm 2", "training.shares": [0.78, 0.20, 0.02], "training.overlap": 0.5, BRANCH: 0.25},
                {SPLIT: "algorithm 2", "training.shares": [0.88, 0.11, 0.01], "training.overlap": 0.25, BRANCH: 0.25},
            ),
            "d": (
                {"training.shares": [0.75, 0.22, 0.03], "training.overlap": 0.5, BRANCH: 0.5},
                {"training.shares": [0.75, 0.22, 0.03], "training.overlap": 0.5, BRANCH: 0.25},
                {"training.shares": [0.85, 0.14, 0.01], "training.overlap": 0.25, BRANCH: 0.25},
            ),
        },
        chosen={"a": 0, "b": 2, "c": 1, "d": 2},
        steps={"tuning": 2000, "final": 3000},
    ),
    "V": Setting(
        size=16,
        preset="cifar10-dpm-one-stage",
        base=_small_networks(),
        splits={"algorithm 1": StageSettings()},
        variants={
            "a": ({},),
            "c": (
                {SPLIT: "algorithm 1", "network.decoder_widths": [24, 16, 4], "training.shares": V_SHARES},
                {
                    SPLIT: "algorithm 1",
                    "network.decoder_widths": [24, 16, 4],
                    "training.shares": V_SHARES,
                    BRANCH: 0.25,
                },
            ),
            "e": ({SPLIT: "algorithm 1", "training.shares": V_SHARES, BRANCH: 1.0},),
            "f": ({SPLIT: "algorithm 1", "training.shares": V_SHARES},),
        },
        chosen={"a": 0, "c": 0, "e": 0, "f": 0},
        steps={"tuning": 1024, "final": 8192},
    ),
    "E": Setting(
        size=16,
        preset="cifar10-edm-one-stage",
        base=_small_networks(
            **{
                "network.augment_dim": 0,
                "training.augment": 0.0,
                "diffusion.sigma_data": SIGMA_DATA_16,
                "sampling.solver": "dpm",
                "sampling.method": "singlestep",
                "sampling.order": 3,
                "sampling.calls": 20,
                "sampling.spacing": "log-snr",
            }
        ),
        splits={
            "algorithm 1": StageSettings(),
            "gaussian": StageSettings(algorithm=2, stages=3, denoiser="gaussian"),
        },
        variants={
            "a": ({},),  # its density was compared with another in setting edges
            "c": (  # decoders, stages and rows of setting V
                {SPLIT: "algorithm 1", "network.decoder_widths": [24, 16, 4], "training.shares": V_SHARES},
            ),
        },
        chosen={"a": 0, "c": 0},
        steps={"tuning": 2048, "final": 8192},
    ),
}
SETTINGS["T"] = dataclasses.replace(
    SETTINGS["V"],
    variants={
        "a": SETTINGS["V"].variants["a"],
        "c": SETTINGS["V"].variants["c"][:1],
        "u": tuple(_transformer([64], [2], lr) for lr in (4e-3, 2e-3)),
        "v": tuple(
            {SPLIT: "algorithm 1", "training.shares": V_SHARES, **_transformer([96, 48, 32], [2, 2, 2], lr)}
            for lr in (4e-3, 2e-3)
        ),
    },
    chosen={"a": 0, "c": 0, "u": 0, "v": 0},
    steps={"tuning": 1024, "final": 4096},
)
SETTINGS["B"] = dataclasses.replace(
    SETTINGS["V"],
    base={**SETTINGS["V"].base, START: ("V", "a"), "evaluation.every": 512},
    steps={"tuning": 512, "final": 4096},
)
_V_CHOICE = SETTINGS["V"].variants["c"][0]
SETTINGS["levers"] = dataclasses.replace(
    SETTINGS["V"],
    variants={
        "c": (
            {**_V_CHOICE, "training.overlap": 0.25},
            {**_V_CHOICE, "training.loss_weighting": "learned"},
            {**_V_CHOICE, BRANCH: 0.25},
            {**_V_CHOICE, "training.reference_rows": 1024},
            {**_V_CHOICE, "training.shares": (0.45, 0.33, 0.22), "network.decoder_widths": [20, 16, 4]},
        )
    },
    chosen={},
    steps={"tuning": 4096, "final": 8192},
    tuning_seed=21,
)
SETTINGS["edges"] = dataclasses.replace(
    SETTINGS["E"],
    base={
        **SETTINGS["E"].base,
        "training.shares": "prior",
        "training.floor_share": 0.05,
        "training.overlap": 0.25,
        "evaluation.every": 768,
    },
    variants={
        "a": ({}, {"diffusion.prior.p_mean": -0.58, "diffusion.prior.p_std": 1.51}),
        "c": (
            {SPLIT: "gaussian"},
            {SPLIT: "gaussian", BRANCH: 0.5},
            {SPLIT: "gaussian", "network.decoder_widths": [24, 16, 4], "training.shares": V_SHARES},
        ),
        "o": ({SPLIT: "algorithm 1"},),
        "d": ({}, {"network.decoder_widths": [16, 8, 4]}),
        "n": ({"network.decoder_widths": [16, 8, 4]},),
    },
    chosen={"a": 0, "c": 0, "o": 0, "d": 0, "n": 0},
    steps={"tuning": 1536, "final": 1536},
    tuning_seed=21,
)


# For a GPU: a wider network on padded images. Nothing is chosen: it has not been run.
SETTINGS["32"] = dataclasses.replace(
    SETTINGS["16"],
    size=32,
    base={
        **SETTINGS["16"].base,
        "network.encoder_width": 32,
        "network.decoder_widths": [32, 32, 32],
        "network.channel_mult": [1, 2, 2],
        "diffusion.sigma_data": 0.6,
        "optimizer.lr": 1e-3,
        "optimizer.decay_after": 2500,
        "training.batch": 128,
        "training.held_out_every": 2500,
        "training.checkpoint_every": 500,
        "evaluation.every": 2500,
    },
    chosen={},
    steps={"tuning": 10_000, "final": 20_000},
)


def data_config(size: int) -> DataConfig:
    return DataConfig(source="fashion-mnist", size=(size, size), fit="resize" if size < 28 else "pad")


def configuration(name: str, arm: str, variant: int, seed: int, steps: int, cuts: Cuts) -> RunConfig:
    """Return the run of an arm, without the run that it starts from."""
    setting = SETTINGS[name]
    changes = setting.changes(arm, variant)
    changes["training.branch_at"] = round(steps * changes.pop(BRANCH, 0.0))
    stages = cuts.splits[changes.pop(SPLIT)] if SPLIT in changes else cuts.even
    own = "network" in changes  # of another family: the base's settings of a network do not apply
    if arm == "a":
        changes["network.decoder_widths"] = setting.base["network.decoder_widths"][:1]
    if arm in ONE:
        changes["training.shares"], stages = "uniform", ()
    keys = {
        "data": dataclasses.replace(data_config(setting.size), shape=(1, setting.size, setting.size)),
        **{
            key: value
            for key, value in setting.base.items()
            if key != START and not (own and key.startswith("network."))
        },
        "stages": Stages(stages, {"data": "fashion-mnist"}),
        **({} if own else {"network.separate": arm == "b"}),
        **changes,
        "training.steps": steps,
        "training.seed": seed,
        "evaluation.seed": seed,
    }
    return override(preset(setting.preset), keys)


def measured_flops(config: RunConfig) -> float:
    """Count the operations of a real training step, forward and backward, per image."""
    data, _ = open_data(config.data.source, size=config.data.size, fit=config.data.fit).split(config.data.held_out)
    shares = stage_shares(config.training, config.stages, config.diffusion.prior)
    counts = row_counts(config.training, shares)
    weights = stage_weights(config.training, config.stages, config.diffusion.prior)
    denoiser = build_denoiser(config).train()
    batch = BatchSource(config, data, torch.device("cpu")).draw(0, counts)
    # the counter does not know the CPU's fused attention
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        objective(stage_losses(denoiser, batch), weights, counts).backward()
    return counter.get_total_flops() / config.training.batch


# -- runs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One run: an arm's variant with a seed."""

    setting: str
    arm: str
    variant: int
    seed: int
    steps: int

    @property
    def name(self) -> str:
        return f"{self.arm}{self.variant}-seed{self.seed}"


def work(job: Job, folder: Path, cuts: Cuts, threads: int) -> None:
    """Train a run to its end, or go on with it; a run that is done is left alone."""
    torch.set_num_threads(threads)
    out = folder / job.setting / job.name
    if (out / "config.json").exists():
        if steps_done(Run.open(out)) < job.steps:
            resume(out)
    else:
        start = started_from(job, folder)
        changes = {} if start is None else {"training.init_from": str(start)}
        train(configuration(job.setting, job.arm, job.variant, job.seed, job.steps, cuts), out, changes)


def started_from(job: Job, folder: Path) -> Path | None:
    """Return the run that another starts from; None if it starts from scratch."""
    if START not in SETTINGS[job.setting].base:
        return None
    setting, arm = SETTINGS[job.setting].base[START]
    first = Job(setting, arm, SETTINGS[setting].chosen[arm], job.seed, SETTINGS[setting].steps["final"])
    path = folder / setting / first.name
    if not (path / "config.json").exists():
        raise SystemExit(f"{path}: is not there; train it first (--setting {setting} --arms {arm} --seeds {job.seed})")
    return path


def curve(run: Run) -> list[dict[str, float]]:
    """Return the evaluation points of a run: images, petaFLOPs, Fréchet distance."""
    names = ("step", "images", "petaflops", "frechet")
    return [{name: r[name] for name in names} for r in run.records() if r["kind"] == "quality" and r["frechet"]]


# -- the cost of sampling ---------------------------------------------------------------------------------------------------


def sampled(path: Path, reference: Path, threads: int) -> list[dict[str, float]]:
    """Return the Fréchet distance of a run's samples by the number of denoiser calls."""
    torch.set_num_threads(threads)
    run = Run.open(path)
    config, found = run.config(), []
    for calls in CALLS:
        sampling = dataclasses.replace(config.sampling, calls=calls)
        result = compare(
            run,
            reference,
            count=config.evaluation.count,
            features=config.evaluation.features,
            metrics=("frechet",),
            seed=config.evaluation.seed,
            checkpoint="latest",
            sampling=sampling,
        )
        gigaflops = sampling_flops(config, sampling) / 1e9
        found.append({"calls": calls, "gigaflops": gigaflops, "frechet": result.metrics["frechet"].value})
    return found


def sample_all(name: str, arms: Sequence[str], folder: Path, out: Path, jobs: int, threads: int) -> None:
    """Add to the results what sampling costs, of all final runs of these arms that are there and have not been sampled yet."""
    known = read_json(out)
    waiting = [
        (arm, seed, path)
        for arm, seeds in known["final"].items()
        for seed, entry in seeds.items()
        if arm in arms
        and "sampling" not in entry
        and (path := folder / name / Job(name, arm, SETTINGS[name].choice(arm) or 0, int(seed), 0).name).exists()
    ]
    if not waiting:
        return
    reference = folder / name / "reference.npz"
    if not reference.exists():
        config = Run.open(waiting[0][2]).config()
        statistics_of(config.data, reference, features=config.evaluation.features, keep=0)
    with multiprocessing.get_context("spawn").Pool(jobs, maxtasksperchild=1) as pool:
        curves = pool.starmap(sampled, [(path, reference, threads) for _, _, path in waiting], chunksize=1)
    for (arm, seed, _), points in zip(waiting, curves, strict=True):
        known["final"][arm][seed]["sampling"] = points
    write_json(out, known)


def sampling_summary(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return, for every arm but the first, the sampling FLOPs to the first one's best distance over what it took to."""
    base, found = runs[base_arm(runs)], dict[str, Any]()
    for arm in (arm for arm in runs if arm != base_arm(runs)):
        seeds = [
            s
            for s in sorted(set(base) & set(runs[arm]), key=int)
            if "sampling" in base[s] and "sampling" in runs[arm][s]
        ]
        if seeds:
            curves = [[_by_flops(arms[s]["sampling"]) for arms in (base, runs[arm])] for s in seeds]
            ratios, reached = zip(*(ratio(*pair) for pair in curves), strict=True)
            found[arm] = {"seeds": seeds, **interval(ratios, reached)}
    return found


def _by_flops(points: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
    return [{"petaflops": p["gigaflops"] / 1e6, "frechet": p["frechet"]} for p in points]


# -- where the arms differ ------------------------------------------------------------------------------------------------


def noisy(images: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (x, sigma) of the same images at every noise level, the same noise for all arms."""
    for sigma in SIGMAS:
        noise = rng.normal(("efficiency", round(1000 * sigma)), torch.arange(len(images)), images.shape[1:])
        yield images + sigma * noise, torch.full((len(images),), sigma, dtype=torch.float64)


@torch.no_grad()
def errors(denoiser: Denoiser, images: Tensor) -> list[float]:
    """Return the mean squared error per pixel at each of SIGMAS."""
    return [
        statistics.fmean(
            float((denoiser(a, b).to(y.dtype) - y).square().mean())
            for a, b, y in zip(x.split(250), sigma.split(250), images.split(250), strict=True)
        )
        for x, sigma in noisy(images)
    ]


def held_out_images(size: int) -> tuple[Tensor, Tensor]:
    """Return training images, and HELD_OUT_IMAGES of those held out, in [-1, 1]."""
    config = data_config(size)
    training, held_out = open_data(config.source, size=config.size, fit=config.fit).split(config.held_out)
    return to_float(training.tensor()), to_float(held_out.tensor()[:HELD_OUT_IMAGES])


# -- what it shows ------------------------------------------------------------------------------------------------------


def first_reach(points: Sequence[Mapping[str, float]], target: float) -> float:
    """Return the compute at which a curve first comes down to a distance, between points linearly in logarithms.

    Infinity if it never does, and the first point's compute if that is below already.
    """
    before: Mapping[str, float] | None = None
    for point in points:
        if point["frechet"] <= target:
            if before is None:
                return point["petaflops"]
            drop = math.log(before["frechet"] / point["frechet"])
            share = math.log(before["frechet"] / target) / drop
            return before["petaflops"] * (point["petaflops"] / before["petaflops"]) ** share
        before = point
    return math.inf


def ratio(base: Sequence[Mapping[str, float]], other: Sequence[Mapping[str, float]]) -> tuple[float, bool]:
    """Return the compute at which `other` first reaches the best distance of `base`, over what `base` took to.

    If `other` never reaches it, return its whole compute over that of `base`, a lower bound, and False.
    """
    best = min(base, key=lambda point: point["frechet"])
    reached = first_reach(other, best["frechet"])
    known = math.isfinite(reached)
    return (reached if known else other[-1]["petaflops"]) / best["petaflops"], known


def interval(ratios: Sequence[float], reached: Sequence[bool] = ()) -> dict[str, Any]:
    """Return the geometric mean of paired ratios with its 95 % interval (Student's t of their logarithms).

    Ratios that were not reached are lower bounds, censored at the end of their runs: then mean and low end are lower
    bounds, too, and the interval has no upper end. A single ratio has no interval.
    """
    found = {"ratios": list(ratios), "reached": list(reached) or [True] * len(ratios)}
    logs = [math.log(r) for r in ratios]
    mean = statistics.fmean(logs)
    if len(logs) < 2:
        return {**found, "mean": math.exp(mean), "low": None, "high": None}
    half = T_975[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs))
    high = math.exp(mean + half) if all(found["reached"]) else None
    return {**found, "mean": math.exp(mean), "low": math.exp(mean - half), "high": high}


def words(found: Mapping[str, Any]) -> str:
    """Return an interval as text, e.g. "0.700 (0.600 to 0.817)" or "at least 1.020 (from 0.900)"."""
    if not all(found["reached"]):
        low = "" if found["low"] is None else f" (from {found['low']:.3f})"
        return f"at least {found['mean']:.3f}{low}, not reached by {found['reached'].count(False)}"
    return f"{found['mean']:.3f}" + (f" ({found['low']:.3f} to {found['high']:.3f})" if found["low"] else " (one seed)")


def base_arm(runs: Mapping[str, Any]) -> str:
    """Return the arm that the others are compared with: (a), or the first one of a setting without it."""
    return next(arm for arm in ARMS if arm in runs)


def summarise(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return, for every arm but the first, the ratios over the seeds that both have."""
    found: dict[str, Any] = {}
    base = runs[base_arm(runs)]
    for arm in (arm for arm in runs if arm != base_arm(runs)):
        seeds = sorted(set(base) & set(runs[arm]), key=int)
        if seeds:
            ratios, reached = zip(*(ratio(base[s]["curve"], runs[arm][s]["curve"]) for s in seeds), strict=True)
            ends = [runs[arm][s]["curve"][-1]["frechet"] / base[s]["curve"][-1]["frechet"] for s in seeds]
            found[arm] = {"seeds": seeds, "compute": interval(ratios, reached), "distance_at_the_end": interval(ends)}
    return found


def draw(runs: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draw distance against compute: a thin line per seed, a thick one for their geometric mean."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for arm, seeds in runs.items():
        curves = [run["curve"] for run in seeds.values()]
        for points in curves:
            axes.plot(
                [1000 * p["petaflops"] for p in points],
                [p["frechet"] for p in points],
                color=COLOURS[arm],
                linewidth=0.6,
                alpha=0.5,
            )
        mean = [
            (
                1000 * statistics.fmean(p["petaflops"] for p in at),
                math.exp(statistics.fmean(math.log(p["frechet"]) for p in at)),
            )
            for at in zip(*curves, strict=False)
        ]
        axes.plot(
            *zip(*mean, strict=True),
            "o-",
            color=COLOURS[arm],
            linewidth=1.8,
            markersize=4,
            label=f"({arm}) {ARMS[arm]}",
        )
    axes.set(xscale="log", yscale="log", xlabel="training TFLOPs", ylabel="Fréchet distance, 5,000 samples")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=120)


def arm_facts(name: str, arm: str, variant: int, cuts: Cuts) -> dict[str, Any]:
    """Return what an arm is made of, and what it costs: by formula, and counted over a real step."""
    config = configuration(name, arm, variant, 0, SETTINGS[name].steps["final"], cuts)
    return {
        "changes": to_dict(SETTINGS[name].changes(arm, variant)),
        "edges": list(config.stages.interior),
        "encoder_width": config.network.encoder_width,
        "decoder_widths": list(config.network.decoder_widths),
        "shares": list(stage_shares(config.training, config.stages, config.diffusion.prior)),
        "megaflops_per_image": flops_per_image(config) / 1e6,
        "measured_megaflops_per_image": measured_flops(config) / 1e6,
    }


def check_equal(facts: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse arms that do not cost the same as the first; those in CHEAPER may cost less."""
    names = ("megaflops_per_image", "measured_megaflops_per_image")
    first = next(iter(facts.values()))
    for (arm, found), name in itertools.product(facts.items(), names):
        off = found[name] / first[name] - 1
        if abs(off) > TOLERANCE and not (arm in CHEAPER and off < 0):
            raise SystemExit(f"({arm}): {name} {off:+.1%} of the first arm's; change its widths or shares")


def steps_done(run: Run) -> int:
    """Return the step of a run's latest checkpoint; 0 before the first one."""
    found = list_checkpoints(run.checkpoints)
    return checkpoint_step(found[-1]) if found else 0


def collect(name: str, folder: Path, out: Path) -> dict[str, Any]:
    """Read all runs of a setting below the folder into the results."""
    known: dict[str, Any] = read_json(out) if out.exists() else {}
    setting = SETTINGS[name]
    training, held_out = held_out_images(setting.size)
    tuning, final = known.setdefault("tuning", {}), known.setdefault("final", {})
    for path in sorted((folder / name).glob("*-seed*")):
        arm, variant, seed = path.name[0], int(path.name[1:].partition("-")[0]), path.name.partition("seed")[2]
        run = Run.open(path)
        entry = {
            "curve": curve(run),
            "held_out_loss": [r["loss"] for r in run.records() if r["kind"] == "held_out"][-1:],
            "seconds": sum(r["seconds"] for r in run.records()),
        }
        if int(seed) == setting.tuning_seed:
            tuning.setdefault(arm, {})[str(variant)] = {
                "changes": to_dict(setting.changes(arm, variant)),
                **entry,
            }
        elif variant == setting.choice(arm) and steps_done(run) >= setting.steps["final"]:
            known_run = final.get(arm, {}).get(seed, {})
            if known_run.get("curve") != entry["curve"]:  # new, or trained again
                known_run = {"errors": errors(run.denoiser("latest"), held_out)}
            final.setdefault(arm, {})[seed] = {**known_run, **entry}
    known["final"] = {arm: final[arm] for arm in ARMS if arm in final}
    known["summary"] = summarise(known["final"]) if known["final"] else {}
    if final and "optimal_errors" not in known:
        known |= {"sigmas": list(SIGMAS), "optimal_errors": errors(OptimalDenoiser(training), held_out)}
    return known


def error_table(known: Mapping[str, Any]) -> str:
    """Return denoising errors by noise level: the optimal denoiser's, the first arm's, and the others' relative to it.

    Arms whose errors were not measured are left out.
    """
    measured = {
        arm: [run["errors"] for run in seeds.values() if "errors" in run] for arm, seeds in known["final"].items()
    }
    mean = {arm: [statistics.fmean(at) for at in zip(*runs, strict=True)] for arm, runs in measured.items() if runs}
    base = base_arm(mean)
    others = [arm for arm in mean if arm != base]
    lines = [f"{'sigma':>7}{'optimal':>10}{f'({base})':>10}" + "".join(f"{f'({arm})':>9}" for arm in others)]
    for i, (sigma, best) in enumerate(zip(known["sigmas"], known["optimal_errors"], strict=True)):
        relative = "".join(f"{mean[arm][i] / mean[base][i] - 1:+9.1%}" for arm in others)
        lines.append(f"{sigma:7}{best:10.5f}{mean[base][i]:10.5f}{relative}")
    return "\n".join(lines)


def report(known: Mapping[str, Any], name: str) -> None:
    for arm, variants in known.get("tuning", {}).items():
        for number, entry in variants.items():
            ends = ", ".join(f"{p['frechet']:.3f}" for p in entry["curve"])
            print(f"tuning ({arm}) {number}: {ends}   {entry['changes']}")
    for arm, seeds in known.get("final", {}).items():
        for seed, entry in seeds.items():
            print(f"({arm}) seed {seed}: " + ", ".join(f"{p['frechet']:.3f}" for p in entry["curve"]))
    base = base_arm(known["final"]) if known.get("final") else "a"
    for arm, found in known.get("summary", {}).items():
        sampling = sampling_summary(known["final"]).get(arm)
        if sampling:
            print(f"({arm}) sampling FLOPs to ({base})'s best distance, relative to ({base}): {words(sampling)}")
        print(
            f"({arm}) {ARMS[arm]}, setting {name}, relative to ({base}): compute to its best distance "
            f"{words(found['compute'])}; distance at equal compute {words(found['distance_at_the_end'])}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=list(SETTINGS), default="16")
    parser.add_argument("--phase", choices=("tuning", "final"), default="final")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all of the setting")
    parser.add_argument("--seeds", nargs="+", type=int, default=[21, 22, 23])
    parser.add_argument("--variants", nargs="+", type=int, help="of the tuning; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    parser.add_argument("--folder", type=Path, default=Path("runs/efficiency"))
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--sampling", action="store_true", help="train nothing: sample the runs that are done")
    parser.add_argument("--report", action="store_true", help="train nothing")
    args = parser.parse_args(arguments)
    out = args.out or RESULTS / f"efficiency-{args.setting}.json"
    setting = SETTINGS[args.setting]
    arms = args.arms or setting.arms
    threads = max(1, torch.get_num_threads() // args.jobs)
    if args.sampling:
        sample_all(args.setting, arms, args.folder, out, args.jobs, threads)
    elif not args.report:
        cuts = Cuts.of(setting)
        steps = setting.steps[args.phase]
        if args.phase == "tuning":
            jobs = [
                Job(args.setting, arm, variant, setting.tuning_seed, steps)
                for variant, arm in itertools.product(range(max(map(len, setting.variants.values()))), arms)
                if variant < len(setting.variants.get(arm, ())) and variant in (args.variants or [variant])
            ]
            facts = {}
        elif missing := [arm for arm in arms if setting.choice(arm) is None]:
            raise SystemExit(
                f"no variant is chosen yet for {', '.join(missing)}: run --phase tuning, then set `chosen`"
            )
        else:
            facts = {arm: arm_facts(args.setting, arm, setting.choice(arm), cuts) for arm in arms}
            check_equal(facts)
            jobs = [
                Job(args.setting, arm, setting.choice(arm), seed, steps)
                for seed, arm in itertools.product(args.seeds, arms)
            ]
        context = multiprocessing.get_context("spawn")
        with context.Pool(args.jobs, maxtasksperchild=1) as pool:
            done = pool.imap_unordered(partial(work, folder=args.folder, cuts=cuts, threads=threads), jobs)
            for _ in done:  # what a run found is kept when it ends
                known = collect(args.setting, args.folder, out)
                known |= {"cuts": dataclasses.asdict(cuts), "machine": machine()}
                known.setdefault("arms", {}).update(facts)
                write_json(out, known)
    known = read_json(out)
    report(known, args.setting)
    if known.get("final"):
        print(error_table(known))
        draw(known["final"], out.with_suffix(".png"))


def machine() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "processor": platform.processor() or platform.machine(), "torch": torch.__version__}


if __name__ == "__main__":
    main()
