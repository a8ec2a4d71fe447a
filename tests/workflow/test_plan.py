from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistage_diffusion import cli
from multistage_diffusion.commands.options import load_config
from multistage_diffusion.commands.plan import plan_text
from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override, read_json
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.planning import STEP, TOLERANCE, decoder_flops
from multistage_diffusion.reporting.describe import calls_per_stage, sampling_flops
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.shares import prior_masses
from multistage_diffusion.stage_finding import StageSettings
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow import plan as plan_module
from multistage_diffusion.workflow import probes
from multistage_diffusion.workflow.plan import plan
from multistage_diffusion.workflow.stages import find_stages
from multistage_diffusion.workflow.train import train

TINY = {
    "network.encoder_width": 8,
    "network.decoder_widths": [16, 8, 8],
    "network.channel_mult": [1],
    "network.attention_factors": [],
    "training.batch": 12,
    "training.held_out_rows": 4,
    "sampling.calls": 6,
}
SETTINGS = [f"{key}={json.dumps(value)}" for key, value in TINY.items()]


def tiny(**changes: Any) -> RunConfig:
    return override(preset("digits"), {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ROWS", 40)


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stages") / "stages.json"
    find_stages("digits", StageSettings(samples=100), out=out)
    return out


@pytest.fixture
def no_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a probe was trained")

    monkeypatch.setattr(Trainer, "fit", fail)


def run(*arguments: str | Path) -> int:
    return cli.main(["plan", *map(str, arguments)])


# -- a plan and what becomes of it ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_plan_is_trained_as_it_is_and_costs_what_was_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("digits", "--probe-steps", "3", "--budget", "1.5", "--out", "plan.json", "--set", *SETTINGS) == 0
    out = capsys.readouterr().out
    explained, config = read_json(tmp_path / "plan.explained.json"), load_config(tmp_path / "plan.json")
    cost = network_cost(config.network, 8, 8).stages
    assert isinstance(config.training.shares, tuple)
    flops = sum(share * stage.true_flops for share, stage in zip(config.training.shares, cost, strict=True))
    assert abs(flops / 1.5e6 - 1) <= TOLERANCE
    assert explained["flops"] == pytest.approx(flops)
    assert explained["edges_from"] == "algorithm 1"
    assert config.network.encoder_width == 8
    assert config.data.shape == (1, 8, 8)
    for line, stage, width in zip(
        out.splitlines()[1:4], explained["stages"], config.network.decoder_widths, strict=True
    ):
        assert stage["width"] == width
        assert line.split()[0] == str(stage["stage"])
        assert line.split()[-2:] == [str(width), f"{stage['flops'] / 1e6:.4g}"]
        assert f"{stage['loss_narrow']:.4g}  " in line
        assert f"{stage['gain']:.2g} ± {stage['gain_error']:.1g}" in line
    assert [s["sigma"][0] for s in explained["stages"][1:]] == list(config.stages.interior)
    assert all(sentence in out for sentence in explained["sentences"])
    assert out.splitlines()[-1] == (
        "written: plan.json, plan.explained.json (next: msdiff train --config plan.json --out RUN)"
    )
    assert {p.name for p in tmp_path.iterdir()} == {"plan.json", "plan.explained.json"}  # no probe is left
    short = override(config, {"training.steps": 2})
    trained = train(short, tmp_path / "run").config()
    for part in ("network", "stages", "diffusion"):
        assert getattr(trained, part) == getattr(config, part)
    assert trained.training.shares == config.training.shares


@pytest.mark.slow
def test_json_is_what_was_written(edges: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "p.json"
    arguments = ("digits", "--probe-steps", "2", "--stages", edges, "--out", out, "--json")
    assert run(*arguments, "--set", *SETTINGS) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == read_json(tmp_path / "p.explained.json")
    assert printed["edges_from"] == "given stages"
    assert load_config(out).stages.interior == tuple(read_json(edges)["edges_sigma"])
    base = tiny(data__shape=[1, 8, 8])
    cost = network_cost(base.network, 8, 8).stages
    shares = (0.55, 0.35, 0.1)
    assert printed["budget"] == pytest.approx(sum(s * c.true_flops for s, c in zip(shares, cost, strict=True)))
    assert load_config(out).training.shares == shares  # the base's own
    assert run(*arguments, "--set", *SETTINGS) == 2
    assert "exists" in capsys.readouterr().err
    assert run(*arguments, "--overwrite", "--set", *SETTINGS) == 0
    assert json.loads(capsys.readouterr().out) == printed  # the same seeds, the same plan


@pytest.mark.slow
def test_other_numbers_of_stages_get_shares_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[StageSettings] = []

    def find(data: Any, settings: StageSettings, **given: Any) -> Any:
        asked.append(settings)
        return find_stages(data, dataclasses.replace(settings, samples=100), **given)

    monkeypatch.setattr(plan_module, "find", find)
    planned = plan(tiny(), stages=2, probe_steps=1)
    assert [(s.algorithm, s.stages) for s in asked] == [(2, 2)]
    config = planned.config
    masses = prior_masses(config.stages, config.diffusion.prior)
    assert config.training.shares == pytest.approx([(mass + 0.5) / 2 for mass in masses])
    assert len(planned.stages) == len(config.network.decoder_widths) == 2
    assert [s.weight for s in planned.stages] == pytest.approx(masses)
    assert [s.share for s in planned.stages] == pytest.approx(config.training.shares)


@pytest.mark.slow
def test_the_gain_is_the_paired_difference(edges: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = [torch.tensor([1.0, 0.8, 0.9, 1.1]).double() for _ in range(3)]
    many = [few[0] - torch.tensor([0.4, 0.5, 0.6, 0.5]).double(), few[1], few[2] + 1]
    monkeypatch.setattr(plan_module, "probed", lambda *_: [few, many])
    planned = plan(tiny(), result=split_of(edges), probe_steps=1)
    first, second, third = planned.stages
    span = np.log(first.flops_wide / first.flops_narrow)
    assert first.gain == pytest.approx(0.5 / span)
    assert first.gain_error == pytest.approx(np.std([0.4, 0.5, 0.6, 0.5], ddof=1) / 2 / span)
    assert (second.gain, second.gain_counted) == (0.0, 0.0)
    assert third.gain == pytest.approx(-1 / span)
    assert third.gain_counted == pytest.approx(0.0, abs=1e-9)  # no better than its error
    # all the gain, all the arithmetic: with a wider first decoder even the narrowest others would cost too much
    network, shares = planned.config.network, (0.55, 0.35, 0.1)
    wider = [decoder_flops(network, 0, first.width + STEP, (8, 8)), *[decoder_flops(network, 0, 4, (8, 8))] * 2]
    cost = sum(share * (flops or 0) for share, flops in zip(shares, wider, strict=True))
    assert wider[0]
    assert cost + planned.flops_encoder > (1 + TOLERANCE) * planned.budget
    assert first.width > second.width
    assert first.flops_ideal == pytest.approx((planned.budget - planned.flops_encoder) / 0.55, rel=1e-6)
    monkeypatch.setattr(plan_module, "probed", lambda *_: [few, few])
    with pytest.raises(ValueError, match="both probes have the same losses; give more steps"):
        plan(tiny(), result=split_of(edges), probe_steps=1)


def split_of(path: Path) -> Any:
    from multistage_diffusion.stage_finding import StageResult

    return StageResult.load(path)


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_probe")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("photos", "data.source='photos': no file, folder or data set of this name"),
        ("digits --preset digits --config c.json", "--preset NAME and --config FILE both"),
        ("digits --preset digit", "preset 'digit' is unknown"),
        ("digits --out plan.yaml", "a plan is JSON; name it plan.json"),
        ("digits --out there.json", "--out there.json: exists"),
        ("digits --out half.json", "--out half.explained.json: exists"),
        ("digits --stages nowhere.json", "nowhere.json: no such file"),
        ("digits --stages FILE --edges even", "gives the edges; leave one of them out"),
        ("digits --sampling-weight 1", "sampling-weight=1 must be at least 0 and below 1"),
        ("digits --probe-steps 0", "probe-steps=0 must be positive"),
        ("digits --budget -1", "budget=-1 MFLOPs must be positive"),
        ("digits --budget nan", "budget=nan MFLOPs must be positive"),
        ("digits --budget 0.1 --stages FILE", "no valid decoder widths come within 3%"),
        ("digits --held-out 0", "data.held_out=0: a plan compares losses on held-out images"),
        (
            "digits --set training.branch_at=5 network.decoder_widths=[8,8,8]",
            "training.branch_at=5 lets stages share a decoder",
        ),
        ("digits --set network.width=3", "network.width: unknown key"),
        (
            "digits --set training.shares=[1,1,0] training.weights=[1,1,0] --stages FILE",
            "a plan needs rows of every stage",
        ),
        (
            "digits --set training.weights=[1,1,0] --stages 2",
            "training.weights=[1.0, 1.0, 0.0] needs one number for each of",
        ),
        ("digits --set training.batch=2", "training.batch=2 is too small for 3 stages"),
        ("digits --set network.decoder_widths=[4,4,4] --stages FILE", "a plan compares two widths"),
        ("digits --device gpu", "device='gpu' is unknown"),
        ("nowhere --preset digits", "'nowhere': no file, folder or data set of this name"),
    ],
)
def test_a_mistake_is_found_before_any_probe(
    arguments: str,
    words: str,
    edges: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text("mine")
    (tmp_path / "half.explained.json").write_text("mine")
    before = sorted(tmp_path.iterdir())
    assert run(*(str(edges) if a == "FILE" else a for a in arguments.split())) == 2
    out, err = capsys.readouterr()
    assert out == ""
    said = [line for line in err.splitlines() if not line.startswith("digits: 1797 images")]
    assert len(said) == 1
    assert said[0].startswith("msdiff: ")
    assert words in said[0]
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("no_probe")
def test_no_data_no_plan() -> None:
    with pytest.raises(ValueError, match=r"data\.source is empty"):
        plan(tiny(data__source=""))


@pytest.mark.usefixtures("no_probe")
def test_a_split_in_other_units_is_refused(tmp_path: Path) -> None:
    result = find_stages("digits", StageSettings(samples=100, data_range=(0.0, 1.0)))
    with pytest.raises(ValueError, match="run msdiff stages without --data-range"):
        plan(tiny(), result=result)


def test_without_a_preset_the_configuration_is_chosen_for_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "mine.npy", np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8))
    planned: list[RunConfig] = []
    edges: list[object] = []

    def record(config: RunConfig, **asked: object) -> None:
        planned.append(config)
        edges.append(asked["edges"])
        raise KeyboardInterrupt

    monkeypatch.setattr("multistage_diffusion.commands.plan.plan", record)
    monkeypatch.chdir(tmp_path)
    assert run("mine.npy", "--set", "training.batch=12") == 2
    assert run("mine.npy", "--edges", "gaussian") == run("mine.npy", "--preset", "images-32-cpu") == 2
    assert edges == ["even", "gaussian", "optimal"]
    config = planned[0]
    assert (config.name, config.data.size, config.network.channels) == ("images-32-cpu", (8, 8), 1)
    assert config.training.batch == 12


# -- edges, density and sampling ----------------------------------------------------------------------------------------


def without_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [torch.tensor([1.0, 0.8, 0.9, 1.1]).double() for _ in range(3)]
    monkeypatch.setattr(plan_module, "probed", lambda *_: [few, [loss - 0.1 for loss in few]])


@pytest.mark.parametrize("weight", [0.0, 0.25, 0.9])
def test_sampling_counts_in_the_budget(weight: float, edges: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_probes(monkeypatch)
    planned = plan(tiny(), result=split_of(edges), sampling_weight=weight, probe_steps=1)
    config = planned.config
    calls = calls_per_stage(config)
    assert [stage.calls for stage in planned.stages] == calls
    assert [stage.share for stage in planned.stages] == pytest.approx([0.55, 0.35, 0.1])
    costs = [(1 - weight) * s + weight * n / 6 for s, n in zip((0.55, 0.35, 0.1), calls, strict=True)]
    assert [stage.cost_share for stage in planned.stages] == pytest.approx(costs)
    rows, image = training_and_sampling(config)
    assert planned.flops == pytest.approx((1 - weight) * rows + weight * image / 6)
    rows, image = training_and_sampling(tiny(data__shape=[1, 8, 8], stages=config.stages))
    base = preset("digits").stages
    own = calls_per_stage(tiny(data__shape=[1, 8, 8], stages=base))
    each = [stage.true_flops for stage in network_cost(tiny().network, 8, 8).stages]
    image = sum(n * flops for n, flops in zip(own, each, strict=True))
    assert planned.budget == pytest.approx((1 - weight) * rows + weight * image / 6)  # the base's, with its own stages
    assert abs(planned.flops / planned.budget - 1) <= TOLERANCE
    assert planned.sentences[-1].startswith("Probes of 1 step hardly train: take 300")


def training_and_sampling(config: RunConfig) -> tuple[float, float]:
    """Return the mean forward FLOPs of a row, and those of sampling an image."""
    flops = [stage.true_flops for stage in network_cost(config.network, 8, 8).stages]
    rows = sum(share * stage for share, stage in zip((0.55, 0.35, 0.1), flops, strict=True))
    return rows, sampling_flops(config)


def test_edges_are_found_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    without_probes(monkeypatch)
    even = plan(tiny(), edges="even", probe_steps=1)
    wanted = find_stages("digits", StageSettings(algorithm="timestep", stages=3))
    assert (even.edges_from, even.config.stages.interior) == ("even in VP time", wanted.edges_sigma)
    config = tiny()
    gaussian = plan(config, edges="gaussian", probe_steps=1)
    settings = StageSettings(algorithm=2, denoiser="gaussian", stages=3)
    wanted = find_stages("digits", settings, diffusion=config.diffusion)
    assert (gaussian.edges_from, gaussian.config.stages.interior) == ("Gaussian denoiser", wanted.edges_sigma)
    assert gaussian.config.diffusion == config.diffusion


def test_a_density_is_proposed_from_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    without_probes(monkeypatch)
    planned = plan(tiny(), edges="even", density="auto", probe_steps=1)
    settings = StageSettings(algorithm=2, denoiser="gaussian", stages=3, density="auto")
    found = find_stages("digits", settings, diffusion=tiny().diffusion)
    assert found.diffusion is not None
    assert planned.config.diffusion.prior == found.diffusion.prior != tiny().diffusion.prior
    assert [stage.weight for stage in planned.stages] == pytest.approx(
        prior_masses(planned.config.stages, found.diffusion.prior)
    )
    prior = found.diffusion.prior
    assert isinstance(prior, LogNormal)
    words = f"training density proposed from the images: ln sigma {prior.p_mean:g} ± {prior.p_std:g}"
    assert words in plan_text(planned).splitlines()


def test_edges_for_a_proposed_density_are_those_found_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    without_probes(monkeypatch)
    searches: list[StageSettings] = []

    def find(data: Any, settings: StageSettings, **given: Any) -> Any:
        searches.append(settings)
        return find_stages(data, settings, **given)

    monkeypatch.setattr(plan_module, "find", find)
    config = plan(tiny(), edges="gaussian", density="auto", probe_steps=1).config
    assert len(searches) == 1
    settings = StageSettings(algorithm=2, denoiser="gaussian", stages=3)
    again = find_stages("digits", settings, diffusion=config.diffusion)
    assert config.stages.interior == again.edges_sigma


def test_a_weight_of_sampling_alone_is_refused(edges: Path) -> None:
    for weight in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"sampling-weight=.* must be at least 0 and below 1"):
            plan(tiny(), result=split_of(edges), sampling_weight=weight, probe_steps=1)
