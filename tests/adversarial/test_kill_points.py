"""Every command that writes, killed at every point where it does, or told there that the disk is full.

Afterwards the result is whole: the old one or the new one. The command given again does its work, and leaves nothing beside.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from faults import Faults, Killed

from multistage_diffusion.cli import main
from multistage_diffusion.commands import COMMANDS
from multistage_diffusion.files import write_json
from multistage_diffusion.training.checkpoint import list_checkpoints
from multistage_diffusion.training.run import Run

SLOW = (
    "stages",
    "report",
    "describe",
    "import",
    "tables",
    "pipeline",
    "push",
    "compare",
    "plan",
)  # seconds at every point
MOST = 400  # points; no command here has as many


@dataclass(frozen=True)
class Case:
    """A command that writes.

    Attributes:
        name: for messages.
        arguments: its command line, words in braces being paths: {data}, {run}, {out}.
        out: what it writes, relative to the working folder.
        overwrite: the argument that lets it replace a result.
        every: of how many points one is tried: a plan has a hundred, most of them in its probes.
    """

    name: str
    arguments: str
    out: str
    overwrite: str = ""
    every: int = 1


CASES = [
    Case("stages", "stages {data} --algorithm timestep --stages 2 --out {out}", "stages.json", "--overwrite"),
    Case("stats", "stats {data} --out {out}", "stats.npz", "--overwrite"),
    Case("grid", "sample {run} --count 4 --calls 3 --out {out}", "grid.png", "--overwrite"),
    Case("array", "sample {run} --count 4 --calls 3 --out {out}", "images.npz", "--overwrite"),
    Case("folder", "sample {run} --count 3 --calls 3 --out {out}", "images", "--overwrite"),
    Case("evaluate", "evaluate {run} --count 12 --calls 3", "run/evaluation.json"),
    Case("report", "report {run} --count 4", "run/report.html"),
    Case("describe", "describe {run} --out {out}", "network.png", "--overwrite"),
    Case("export", "export {run} --out {out}", "weights.safetensors", "--overwrite"),
    Case("pipeline", "export {run} --format diffusers --out {out}", "pipeline", "--overwrite"),
    Case("push", "push {run} me/x --count 1 --dry-run {out}", "pushed", "--overwrite"),
    Case("compare", "compare {run} --excess --count 4 --levels 2 --out {out}", "excess.html", "--overwrite"),
    Case("pack", "pack {data} --size 2 2 --fit resize --out {out}", "packed.npy", "--overwrite"),
    Case("zip", "pack {data} --out {out}", "packed.zip", "--overwrite"),
    Case(
        "plan",
        "plan {data} --config {tiny} --stages {stages} --probe-steps 1 --out {out}",
        "plan.json",
        "--overwrite",
        every=3,
    ),
    Case("import", "import {exported} --preset digits --size 4 4 --out {out}", "imported", "--replace"),
    Case("tables", "tables --out {out}", "tables.md", "--overwrite"),
]


@pytest.fixture(scope="module")
def template(tmp_path_factory, tiny_config, tiny_data) -> Path:
    """A folder with data, a trained run and an exported file."""
    folder = tmp_path_factory.mktemp("template")
    np.savez(folder / "data.npz", images=tiny_data(60).array()[:, 0])
    config = tiny_config(data__source=str(folder / "data.npz"), data__held_out=0.4, training__steps=2)
    write_json(folder / "tiny.json", config)
    assert main(["train", "--config", str(folder / "tiny.json"), "--out", str(folder / "run"), "--device", "cpu"]) == 0
    assert main(["export", str(folder / "run"), "--out", str(folder / "exported.safetensors")]) == 0
    stages = ["--algorithm", "timestep", "--stages", "2", "--out", str(folder / "found.json")]
    assert main(["stages", str(folder / "data.npz"), *stages]) == 0
    return folder


def words(case: Case, folder: Path) -> list[str]:
    places = {
        "data": folder / "data.npz",
        "run": folder / "run",
        "exported": folder / "exported.safetensors",
        "tiny": folder / "tiny.json",
        "stages": folder / "found.json",
        "out": folder / case.out,
    }
    return case.arguments.format(**places).split()


def content(path: Path) -> dict[str, bytes]:
    """Return all files of a path that does not change by itself: a lock is empty, times of a log are left out."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {
        str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file() and p.name != ".lock"
    }


def entries(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.name != ".lock"}


def beside(case: Case, folder: Path, before: set[str]) -> set[str]:
    """Return what is there now beside the result, its picture and what it replaced, and was not before."""
    own, stem = case.out.split("/")[0], Path(case.out.split("/")[0]).stem
    fine = (own, f"{stem}.png", f"{stem}.explained.json", f"{own}.replaced-")
    new = {name for name in entries(folder) - before if not name.startswith(fine)}
    return new | {name for name in entries(folder) if ".writing-" in name}


def test_every_command_that_writes_is_killed_somewhere() -> None:
    writing = {
        name for name, command in COMMANDS.items() if {"out", "dry_run"} & {f.name for f in dataclasses.fields(command)}
    }
    elsewhere = {"train", "train-codec", "demo", "quickstart"}  # runs that go on: below, and in tests of codecs
    assert writing - elsewhere <= {case.arguments.split()[0] for case in CASES}


@pytest.mark.parametrize("full", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["killed", "full"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] * (case.name in SLOW)) for case in CASES],
)
def test_the_result_is_whole(case: Case, full: bool, template: Path, tmp_path: Path, capsys) -> None:
    check_every_point(case, template, tmp_path, full, lambda: capsys.readouterr().err)


def check_every_point(case: Case, template: Path, tmp_path: Path, full: bool, errors: Callable[[], str]) -> None:
    shutil.copytree(template, tmp_path / "warm")
    assert main(words(case, tmp_path / "warm")) == 0, errors()  # what imports write is not the command's
    errors()
    for point in range(full % case.every, MOST, case.every):
        folder = tmp_path / str(point)
        shutil.copytree(template, folder)
        before, old = entries(folder), content(folder / case.out)
        faults, code = Faults(point, full=full), None
        try:
            with faults.active():
                code = main(words(case, folder))
        except Killed:
            pass
        said = errors()
        if not faults.struck:
            assert code == 0, said
            return
        if full and code != 0:
            assert code == 2, f"{case.name}: point {point}: {said}"
            lines = [line for line in said.splitlines() if line.startswith("msdiff: ") and "warning:" not in line]
            assert len(lines) == 1, said
            assert "No space left" in lines[0], said
            assert not beside(case, folder, before), f"{case.name}: point {point}"
        if old:
            assert content(folder / case.out), f"{case.name}: the old result is gone at point {point}"
        replace = [case.overwrite] if case.overwrite and (folder / case.out).exists() else []
        assert main([*words(case, folder), *replace]) == 0, f"{case.name}: again after point {point}: {errors()}"
        errors()
        assert not beside(case, folder, before), f"{case.name}: point {point}"
        shutil.rmtree(folder)
    raise AssertionError(f"{case.name}: more than {MOST} points")


def _die_at(point: int, arguments: list[str]) -> None:
    """Run a command in this process and end it by SIGKILL at a point, or well."""
    torch.set_num_threads(1)
    with Faults(point, really=True).active():
        code = main(arguments)
    os._exit(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name not in ("tables", "plan")], ids=lambda case: case.name
)  # a process counts the tables' networks for a minute, and a plan has a hundred points
def test_a_process_killed_with_9_leaves_the_result_whole(case: Case, template: Path, tmp_path: Path, capsys) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["multistage_diffusion.commands", "multistage_diffusion.reporting.report"])
    point = 0
    while True:
        folder = tmp_path / str(point)
        shutil.copytree(template, folder)
        before, old = entries(folder), content(folder / case.out)
        process = context.Process(target=_die_at, args=(point, words(case, folder)))
        process.start()
        process.join()
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            break
        assert content(folder / case.out) or not old, f"{case.name}: the old result is gone at point {point}"
        replace = [case.overwrite] if case.overwrite and (folder / case.out).exists() else []
        assert main([*words(case, folder), *replace]) == 0, f"{case.name}: {point}: {capsys.readouterr().err}"
        assert not beside(case, folder, before), f"{case.name}: point {point}"
        shutil.rmtree(folder)
        point += 3  # every third: a process takes seconds to begin
    assert point > 0


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True], ids=["killed", "full"])
def test_a_run_goes_on_from_its_last_checkpoint(full: bool, template: Path, tmp_path: Path, capsys) -> None:
    point = 0
    while True:
        folder = tmp_path / str(point)
        shutil.copytree(template, folder)
        run, faults, code = folder / "new", Faults(point, full=full), None
        train = ["train", "--config", str(folder / "tiny.json"), "--out", str(run), "--device", "cpu", "--set"]
        try:
            with faults.active():
                code = main([*train, "training.checkpoint_every=1", "training.keep_last=1"])
        except Killed:
            pass
        said = capsys.readouterr().err
        if not faults.struck:
            assert code == 0, said
            break
        if (run / "config.json").exists():
            assert main(["train", "--resume", str(run), "--device", "cpu"]) == 0, capsys.readouterr().err
        else:
            assert main([*train, "training.checkpoint_every=1", "training.keep_last=1"]) == 0, capsys.readouterr().err
        last = list_checkpoints(Run.open(run).checkpoints)[-1]  # the one before it may not have been removed yet
        assert last.name == "step_00000002"
        assert content(last).keys() >= {"model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"}
        shutil.rmtree(folder)
        point += 1
    assert point > 20
