"""One file in a kind's folder adds a solver, spacing, schedule, density or preconditioning to all commands."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_data

from multistage_diffusion import cli
from multistage_diffusion.commands.options import SamplerOptions
from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.config.run import PRECONDITIONINGS
from multistage_diffusion.config.sampling import SOLVERS, SPACINGS
from multistage_diffusion.errors import UserError
from multistage_diffusion.files import write_json
from multistage_diffusion.registry import Registry
from multistage_diffusion.samplers import make_plan, sample, start_noise
from multistage_diffusion.schedules import PRIORS, SCHEDULES
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.training.run import Run

SOLVER = """
from multistage_diffusion.config.sampling import SOLVERS
from multistage_diffusion.samplers import Solver

@SOLVERS.add("euler")
class Euler(Solver):
    def step(self, x, step, denoise, add_noise):
        sigma = step.calls[0]
        return x + (step.end - sigma) * (x - denoise(x, sigma)) / sigma
"""

SPACING = """
import math
from multistage_diffusion.config.sampling import SPACINGS
from multistage_diffusion.samplers import Spacing

@SPACINGS.add("decades")
class Decades(Spacing):
    def to(self, sigma):
        return math.log10(sigma)

    def back(self, u):
        return 10.0**u
"""

SCHEDULE = """
from dataclasses import dataclass
import torch
from multistage_diffusion.contracts import as_float64
from multistage_diffusion.schedules import SCHEDULES, VariancePreserving

@SCHEDULES.add("again")
@dataclass(frozen=True, kw_only=True)
class Again(VariancePreserving):
    slope: float = 19.9
    t_min: float = 1e-3
    t_max: float = 1.0

    def sigma(self, t):
        t = as_float64(t)
        return torch.sqrt(torch.expm1((0.5 * self.slope * t + 0.1) * t))

    def time(self, sigma):
        exponent = torch.log1p(as_float64(sigma) ** 2)
        return 2.0 * exponent / (0.1 + torch.sqrt(0.1**2 + 2.0 * self.slope * exponent))
"""

DENSITY = """
import math
from dataclasses import dataclass
import torch
from multistage_diffusion.schedules import PRIORS, SigmaPrior, clamp_half_open

@PRIORS.add("log-uniform")
@dataclass(frozen=True, kw_only=True)
class LogUniform(SigmaPrior):
    least: float = 0.01
    most: float = 50.0

    def _inside(self, sigma):
        return min(max(sigma, self.least), self.most)

    def mass(self, low, high):
        return max(math.log(self._inside(high) / self._inside(low)), 0.0) / math.log(self.most / self.least)

    def sample_within(self, u, low, high):
        if not self.mass(low, high) > 0:
            raise self._empty(low, high)
        start, end = math.log(self._inside(low)), math.log(self._inside(high))
        return clamp_half_open(torch.exp(start + u * (end - start)), low, high)
"""

PRECONDITIONING = """
from dataclasses import dataclass
from multistage_diffusion.config.run import PRECONDITIONINGS
from multistage_diffusion.preconditioning import Coefficients, Preconditioning

@PRECONDITIONINGS.add("unit")
@dataclass(frozen=True)
class Unit(Preconditioning):
    def coefficients(self, sigma):
        total = sigma**2 + 1.0
        noise = 0.25 * sigma.clamp(min=1e-12).log()
        return Coefficients(1.0 / total, sigma * total.rsqrt(), total.rsqrt(), noise)
"""

Plant = Callable[[Registry[Any], str], None]


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Plant]:
    """Return what puts one file into the folder of a registry, for the time of the test."""
    planted = []

    def put(registry: Registry[Any], source: str) -> None:
        registry.names()  # imports all others, which add themselves once only
        package = importlib.import_module(registry.package)
        folder = tmp_path / "planted"
        folder.mkdir()
        (folder / "toy.py").write_text(source)
        importlib.invalidate_caches()
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.setattr(registry, "_known", dict(registry._known))
        monkeypatch.setattr(registry, "_complete", False)
        planted.append(package)

    yield put
    for package in planted:
        del package.toy
        del sys.modules[f"{package.__name__}.toy"]


def msdiff(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def trained(folder: Path, **changes: object) -> tuple[Path, list[list[float]]]:
    """Train a tiny run by command; return its folder and each step's loss of every stage."""
    folder.mkdir()
    np.savez(folder / "data.npz", images=tiny_data(60).array().transpose(0, 2, 3, 1))
    write_json(folder / "config.json", tiny_config(**changes))
    run = folder / "run"
    msdiff("train", "--config", folder / "config.json", "--data", folder / "data.npz", "--out", run)
    return run, [record["loss"] for record in Run(run).records() if "loss" in record]


def drawn(run: Path, *options: str) -> np.ndarray:
    """Draw by command; return the images."""
    msdiff("sample", run, "--count", 3, "--out", run / "x.npz", "--overwrite", *options)
    return np.load(run / "x.npz")["images"].astype(int)


def reported(run: Path) -> str:
    msdiff("report", run)
    return (run / "report.html").read_text()


@pytest.mark.slow
def test_a_solver(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Euler's step in sigma is DDIM's."""
    plant(SOLVERS, SOLVER)
    run, _ = trained(tmp_path / "own", sampling__solver="euler", sampling__order=3)
    assert json.loads((run / "config.json").read_text())["sampling"]["solver"] == "euler"
    assert np.abs(drawn(run) - drawn(run, "--solver", "ddim")).max() <= 1
    assert "not selected (euler, 4 calls)" in reported(run)
    denoiser, ends = Run(run).denoiser().double(), []
    for solver in ("euler", "ddim"):
        config = dataclasses.replace(Run(run).config().sampling, solver=solver, calls=12)
        plan = make_plan(config, EDM())
        ends.append(sample(denoiser, start_noise(0, torch.arange(3), (1, 4, 4), plan, torch.float64), plan))
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-12, atol=1e-12)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["sample", "--help"])
    assert "{ddim,dpm,dpm++,euler,heun}" in capsys.readouterr().out
    assert cli.main(["sample", str(run), "--order", "2"]) == 2
    assert "sampling.order=2: has no meaning for solver 'euler'" in capsys.readouterr().err


def test_a_solver_s_own_order_and_method_are_taken_where_the_run_s_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    class Narrow(SOLVERS["ddim"]):  # type: ignore[misc]
        orders, methods = (2, 1), ("multistep",)

    monkeypatch.setattr(SOLVERS, "_known", {name: SOLVERS[name] for name in SOLVERS})
    SOLVERS.add("narrow")(Narrow)
    own = SamplingConfig(method="singlestep", order=3)
    found = SamplerOptions(solver="narrow").sampling_config(own)
    assert (found.method, found.order) == ("multistep", 2)
    assert SamplerOptions(solver="narrow").sampling_config(dataclasses.replace(own, order=1)).order == 1
    with pytest.raises(UserError, match=r"sampling\.order=3 must be one of 1, 2 \(solver 'narrow'\)"):
        SamplerOptions(solver="narrow", order=3).sampling_config(own)
    with pytest.raises(UserError, match=r"sampling\.method='singlestep' must be one of 'multistep'"):
        SamplingConfig(solver="narrow", order=2)


def test_a_spacing(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Even in decades is even in the logarithm."""
    plant(SPACINGS, SPACING)
    run, _ = trained(tmp_path / "own", sampling__spacing="decades")
    assert np.abs(drawn(run) - drawn(run, "--spacing", "log-snr")).max() <= 1
    reported(run)
    capsys.readouterr()
    msdiff("describe", run)
    assert "4 calls of dpm, singlestep, order 3, decades spacing" in capsys.readouterr().out


@pytest.mark.slow
def test_a_schedule(plant: Plant, tmp_path: Path) -> None:
    """A schedule that is VP's, but for its name, trains as VP does."""
    plant(SCHEDULES, SCHEDULE)
    runs, losses = {}, {}
    for kind in ("vp", "again"):
        schedule = {"kind": kind}
        diffusion = {"precondition": "vp-eps", "schedule": schedule}
        prior = {"kind": "uniform-time", "schedule": schedule}
        runs[kind], losses[kind] = trained(tmp_path / kind, diffusion={**diffusion, "prior": prior})
    assert losses["again"] == losses["vp"]
    written = json.loads((runs["again"] / "config.json").read_text())["diffusion"]["schedule"]
    assert written == {"kind": "again", "slope": 19.9, "t_min": 1e-3, "t_max": 1.0}
    images = [drawn(run, "--spacing", "time") for run in runs.values()]
    assert np.array_equal(*images)
    reported(runs["again"])
    found = tmp_path / "stages.json"
    data = tmp_path / "vp" / "data.npz"
    msdiff("stages", data, "--schedule", "again", "--samples", 100, "--times", 2, "--out", found)
    assert json.loads(found.read_text())["schedule"]["kind"] == "again"


@pytest.mark.slow
def test_a_density(plant: Plant, tmp_path: Path) -> None:
    """In the limits of its range every draw lies in its stage, and the masses sum to 1."""
    plant(PRIORS, DENSITY)
    run, losses = trained(tmp_path / "own", diffusion__prior={"kind": "log-uniform", "most": 20.0})
    assert len(losses) == 4
    config = Run(run).config()
    assert [config.diffusion.prior.kind, config.diffusion.prior.most] == ["log-uniform", 20.0]
    masses = [config.diffusion.prior.mass(*config.stages.interval(k)) for k in range(3)]
    assert sum(masses) == pytest.approx(1.0, abs=1e-15)
    assert drawn(run).shape == (3, 1, 4, 4)
    reported(run)


@pytest.mark.slow
def test_a_preconditioning(plant: Plant, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """EDM's with sigma_data = 1, written out, trains as EDM's does."""
    plant(PRECONDITIONINGS, PRECONDITIONING)
    unit, losses = trained(tmp_path / "own", diffusion__precondition="unit")
    edm, expected = trained(tmp_path / "known", diffusion__sigma_data=1.0)
    np.testing.assert_allclose(losses, expected, rtol=1e-6)
    assert np.abs(drawn(unit) - drawn(edm)).max() <= 1
    reported(unit)
    capsys.readouterr()
    arguments = ["train", "--config", tmp_path / "known" / "config.json", "--data", tmp_path / "known" / "data.npz"]
    assert cli.main([*map(str, arguments), "--out", "x", "--set", "diffusion.precondition=unti"]) == 2
    assert (
        f"diffusion.precondition='unti' must be one of {', '.join(PRECONDITIONINGS.names())}" in capsys.readouterr().err
    )


def test_what_was_planted_is_gone() -> None:
    for registry in (SOLVERS, SPACINGS, SCHEDULES, PRIORS, PRECONDITIONINGS):
        assert not {"euler", "decades", "again", "log-uniform", "unit"} & set(registry)
