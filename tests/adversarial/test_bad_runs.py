"""Run folders that are damaged, foreign or edited by hand."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adversary import DEEP, TINY, Case, both, cases, cut, drop, edited, fifo, file, folder_in_place, put, removed
from PIL import Image
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.slow

LATEST = "run/checkpoints/step_00000002"
STATE, EMA, MODEL, MOMENTS = (
    f"{LATEST}/{name}" for name in ("state.json", "ema.safetensors", "model.safetensors", "optimizer.safetensors")
)
RESUME = ("train", "--resume", "run", "--set", "training.steps=3")
SAMPLE = ("sample", "run", "--count", "2", "--checkpoint", "latest", "--out", "new.npz")
REPORT = ("report", "run", "--count", "4")
TRAIN = ("train", "--preset", "digits", "--data", "digits", "--stages", "run/stages.json", "--out", "new", *TINY)
EVALUATE = ("evaluate", "run", "--against", "reference.npz", "--count", "8")

Maker = Callable[[Path], Any]


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> Maker:
    """Return what changes a file of tensors and its digest: only the tensors themselves are wrong."""

    def make(folder: Path) -> None:
        found = load_file(folder / name)
        change(found)
        save_file(found, folder / name)
        state = (folder / name).with_name("state.json")
        data, told = (folder / name).read_bytes(), json.loads(state.read_text())
        told["files"][Path(name).name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        state.write_text(json.dumps(told))

    return make


def first(change: Callable[[torch.Tensor], torch.Tensor], part: str = "") -> Callable[[dict[str, torch.Tensor]], None]:
    """Return what changes the first tensor whose name ends in part."""

    def apply(found: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(found) if name.endswith(part))
        found[name] = change(found[name]).contiguous()

    return apply


def line(name: str, record: Any) -> Maker:
    """Return what puts a line before those of a file."""

    def make(folder: Path) -> None:
        text = record if isinstance(record, str) else json.dumps(record)
        (folder / name).write_text(f"{text}\n{(folder / name).read_text()}")

    return make


def flipped(name: str, share: float) -> Maker:
    """Return what flips a bit of a file."""

    def make(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[int(len(data) * share)] ^= 64
        (folder / name).write_bytes(data)

    return make


def renamed(folder: Path) -> None:
    (folder / LATEST).rename(folder / "run/checkpoints/step_00000077")


def linked(folder: Path) -> None:
    os.symlink(folder / "outside", folder / "run/.lock.new")
    (folder / "run/.lock").unlink(missing_ok=True)
    (folder / "outside").write_text("mine")
    (folder / "run/.lock.new").rename(folder / "run/.lock")


def huge_picture(folder: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(folder / "run/stages.png")


NOTHING = {
    "empty": "",
    "text": "hello",
    "deep": DEEP,
    "a list": "[]",
    "null": "null",
    "binary": b"\xff\xfe\0",
    "half": '{"step": ',
}

STATES: dict[str, Maker] = {
    **{f"state.json is {name}": file(STATE, content) for name, content in NOTHING.items()},
    "state.json is a pipe": fifo(STATE),
    "state.json is cut": cut(STATE, 0.5),
    "state.json without config": edited(STATE, drop("config")),
    "state.json of a null config": edited(STATE, put("config", value=None)),
    "state.json of a broken config": edited(STATE, put("config", "network", value=7)),
}
RESUMED: dict[str, Maker] = {
    "state.json without step": edited(STATE, drop("step")),
    **{
        f"state.json of step {value!r}": edited(STATE, put("step", value=value))
        for value in (-1, 1.5, "2", None, True, 10**15, 10**30, [2], 1)
    },
    **{
        f"state.json of images {value!r}": edited(STATE, put("images", value=value)) for value in (-1, "x", None, 1e300)
    },
    **{
        f"state.json of sums {value!r}": edited(STATE, put("sums", value=value))
        for value in (None, 7, [], {}, {"x": 1})
    },
    **{f"state.json of scaler {value!r}": edited(STATE, put("scaler", value=value)) for value in (7, [1], {"x": 1})},
    **{f"state.json of score {value!r}": edited(STATE, put("score", value=value)) for value in ("low", [1])},
    **{f"state.json of quality {value!r}": edited(STATE, put("quality", value=value)) for value in ("low", [1])},
    "state.json without sums": edited(STATE, drop("sums")),
    "state.json without scaler": edited(STATE, drop("scaler")),
    "checkpoint of another step": renamed,
    "lock that is a link": both(linked, file("run/config.json", "{}")),
}
WEIGHTS: dict[str, Callable[[str], Maker]] = {
    "missing": removed,
    "empty": lambda name: file(name, b""),
    "text": lambda name: file(name, b"hello"),
    "zeros": lambda name: file(name, bytes(1000)),
    "a pickle": lambda name: file(name, b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR."),
    "a pipe": fifo,
    "a folder": folder_in_place,
    "cut": lambda name: cut(name, 0.6),
    "cut header": lambda name: cut(name, 0.01),
    "of a huge header": lambda name: file(name, (2**60).to_bytes(8, "little") + b"{}"),
    "of a flipped bit": lambda name: flipped(name, 0.9),
    "without tensors": lambda name: tensors(name, dict.clear),
    "without one tensor": lambda name: tensors(name, lambda t: t.pop(sorted(t)[0])),
    "of a tensor more": lambda name: tensors(name, lambda t: t.update(more=torch.zeros(3))),
    "of another shape": lambda name: tensors(name, first(lambda v: torch.zeros(v.numel() + 1))),
    "of true and false": lambda name: tensors(name, first(lambda v: v > 0)),
    "of NaN": lambda name: tensors(name, first(lambda v: v * torch.nan)),
    "of infinity": lambda name: tensors(name, first(lambda v: v + torch.inf)),
    "of whole numbers": lambda name: tensors(name, first(lambda v: v.to(torch.int64))),
}
MOMENTA: dict[str, Maker] = {
    "moment of one number": tensors(MOMENTS, first(lambda v: v.reshape(-1)[:1].clone(), "exp_avg")),
    "negative second moment": tensors(MOMENTS, first(lambda v: -v - 1, "exp_avg_sq")),
    "negative step": tensors(MOMENTS, first(lambda v: v * 0 - 5, "step")),
}
FOLDERS: dict[str, Maker] = {
    "no checkpoints": removed("run/checkpoints"),
    "checkpoints that are a file": both(removed("run/checkpoints"), file("run/checkpoints", "mine")),
    "empty checkpoints": both(removed("run/checkpoints"), lambda folder: (folder / "run/checkpoints").mkdir()),
    "no config.json": removed("run/config.json"),
    "empty config.json": file("run/config.json", ""),
    "config.json of other widths": edited("run/config.json", put("network", "encoder_width", value=16)),
    "config.json of other stages": edited("run/config.json", put("stages", "interior", value=[0.1, 0.9])),
    "config.json of another schedule": edited("run/config.json", put("diffusion", "sigma_data", value=0.9)),
}
LOGGED: dict[str, Maker] = {
    **{
        f"metrics.jsonl of the line {text}": line("run/metrics.jsonl", text)
        for text in ("hello", "[]", "7", "{}", "\0")
    },
    "metrics.jsonl is a pipe": fifo("run/metrics.jsonl"),
    "metrics.jsonl of a deep line": line("run/metrics.jsonl", DEEP),
    "metrics.jsonl of Latin-1": file("run/metrics.jsonl", b"\xe9\n{}\n"),
    **{
        f"metrics.jsonl of step {value!r}": line("run/metrics.jsonl", {"kind": "train", "step": value})
        for value in ("1", None, 1.5, -1, True, 10**30)
    },
    "metrics.jsonl of kind 7": line("run/metrics.jsonl", {"kind": 7, "step": 1}),
    "metrics.jsonl of text for quality": line("run/metrics.jsonl", {"kind": "quality", "step": 1, "frechet": "low"}),
}
SHOWN: dict[str, Maker] = {
    "metrics.jsonl of one loss": line("run/metrics.jsonl", {"kind": "held_out", "step": 1, "images": 6, "loss": [1.0]}),
    "metrics.jsonl of text for losses": line(
        "run/metrics.jsonl", {"kind": "held_out", "step": 1, "images": 6, "loss": "x"}
    ),
    "metrics.jsonl without loss": line("run/metrics.jsonl", {"kind": "train", "step": 1, "images": 6}),
    "launches.jsonl of text": line("run/launches.jsonl", "hello"),
    "launches.jsonl of numbers": line("run/launches.jsonl", {"time": 1, "command": 2, "device": 3}),
    "launches.jsonl of nothing": line("run/launches.jsonl", {}),
    "launches.jsonl is a pipe": fifo("run/launches.jsonl"),
    **{
        f"evaluation.json is {name}": file("run/evaluation.json", text)
        for name, text in NOTHING.items()
        if name != "a list"
    },
    "evaluation.json of numbers": file("run/evaluation.json", "[1]"),
    "evaluation.json of an empty result": file("run/evaluation.json", "[{}]"),
    "evaluation.json of text": edited("run/evaluation.json", put(0, "metrics", "frechet", "value", value="low")),
    "evaluation.json is a pipe": fifo("run/evaluation.json"),
}
# no command reads a run's stages.json on its own; it is handed to another run
CASES_OF_STAGES: dict[str, Maker] = {
    **{f"stages.json is {name}": file("run/stages.json", text) for name, text in NOTHING.items()},
    "stages.json is a pipe": fifo("run/stages.json"),
}
EVALUATED: dict[str, Maker] = {
    f"evaluation.json is {name}": file("run/evaluation.json", text)
    for name, text in NOTHING.items()
    if name != "a list"
}
HERE: dict[str, Maker] = {
    **{
        f"execution.json is {name}": file("run/execution.json", text)
        for name, text in NOTHING.items()
        if name != "a pipe"
    },
    "execution.json is a pipe": fifo("run/execution.json"),
}


EDITED: dict[str, Maker] = {
    "config.json of another shape": edited("run/config.json", put("data", "shape", value=[1, 16, 16])),
    "config.json with a codec": edited(
        "run/config.json", put("codec", value={"source": "identity", "scale": 1.0, "shape": [1, 8, 8]})
    ),
}


def _table(makers: dict[str, Maker], **commands: tuple[str, ...]) -> list[Case]:
    needs = ("run", "reference.npz")
    return [
        Case(f"{name}, {verb}", arguments, make, needs=needs)
        for verb, arguments in commands.items()
        for name, make in makers.items()
    ]


@cases(_table(STATES, resume=RESUME, sample=SAMPLE))
def test_states(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(_table(RESUMED, resume=RESUME))
def test_states_resumed(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(
    [
        case
        for what, name, commands in (
            ("averages", EMA, {"sample": SAMPLE, "resume": RESUME}),
            ("weights", MODEL, {"resume": RESUME}),
            ("moments", MOMENTS, {"resume": RESUME}),
        )
        for case in _table({f"{what} {how}": make(name) for how, make in WEIGHTS.items()}, **commands)
    ]
    + _table(MOMENTA, resume=RESUME)
)
def test_tensors(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


SINGLE = [
    Case("pixels resumed as latents", (*RESUME, "--codec", "identity"), says="trained on pixels", needs=("run",)),
    Case("profile that is a file", (*RESUME, "--profile"), file("run/profile", "mine"), "run/profile: is no", ("run",)),
    Case("report of a huge picture", REPORT, huge_picture, "remove it", ("run",)),
]


@cases([*_table(FOLDERS | EDITED, sample=SAMPLE, resume=RESUME), *SINGLE])
def test_folders(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(
    _table(LOGGED, resume=RESUME, report=REPORT) + _table(SHOWN, report=REPORT) + _table(CASES_OF_STAGES, train=TRAIN)
)
def test_records(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(_table(EVALUATED, evaluate=EVALUATE))
def test_evaluations(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


@cases(_table(HERE, resume=RESUME))
def test_executions(case: Case, refuses: Callable[[Case], str]) -> None:
    refuses(case)


def test_a_lock_that_is_a_link_is_not_followed(material: Path, tmp_path: Path) -> None:
    shutil.copytree(material / "run", tmp_path / "run")
    linked(tmp_path)
    from multistage_diffusion import cli

    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--set", "training.steps=3"]) in (0, 2)
    assert (tmp_path / "outside").read_text() == "mine"
