"""A training process killed with -9 again and again, often while it writes, ends where an undisturbed one does."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from multistage_diffusion.files import write_json
from multistage_diffusion.training.checkpoint import list_checkpoints
from multistage_diffusion.training.run import Run

pytestmark = pytest.mark.slow

STEPS, KILLS = 300, 20
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # one thread each: the test's own load must not change rounding


@pytest.fixture
def config(tmp_path, tiny_config, tiny_data) -> Path:
    """A run that writes a checkpoint after every step: most of its time is writing."""
    np.save(tmp_path / "images.npy", tiny_data(40).array())
    write_json(
        tmp_path / "tiny.json",
        tiny_config(
            data__source=str(tmp_path / "images.npy"),
            data__held_out=0.2,
            training__steps=STEPS,
            training__log_every=3,
            training__held_out_every=10,
            training__held_out_rows=2,
            training__checkpoint_every=1,
            evaluation__every=20,
            evaluation__count=8,
            evaluation__patience=STEPS,  # every evaluation reads the log
        ),
    )
    return tmp_path / "tiny.json"


def start(*arguments: object, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "multistage_diffusion.cli", "train", *map(str, arguments), "--device", "cpu"]
    environment = {**ENVIRONMENT, **environment}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def outcome(run: Path) -> tuple[dict[str, bytes], dict, list[dict]]:
    """Return the last checkpoint's tensors and state, and the log without its times."""
    last = Run.open(run).checkpoint("latest")
    tensors = {p.name: p.read_bytes() for p in sorted(last.glob("*.safetensors"))}
    records = [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in Run.open(run).records()]
    return tensors, json.loads((last / "state.json").read_text()), records


def writing(run: Path) -> bool:
    return any((run / "checkpoints").glob(".step_*.writing-*"))


def wait_for(condition, process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    """Wait, without sleeping long, until a condition holds or the process has ended."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.0005)


def latest(run: Path) -> int:
    found = list_checkpoints(run / "checkpoints")
    return int(found[-1].name.removeprefix("step_")) if found else 0


def kill_once(run: Path, process: subprocess.Popen[str], rng: random.Random, *, in_write: bool) -> bool:
    """Let training make its first checkpoint, kill it after a random while (or at once in a write); tell if it wrote."""
    before = latest(run)
    wait_for(lambda: latest(run) > before, process)
    time.sleep(rng.uniform(0.0, 0.15))
    if in_write:
        wait_for(lambda: writing(run), process)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, errors
    return writing(run)


def test_killed_twenty_times_it_ends_where_an_undisturbed_run_does(tmp_path, config):
    rng = random.Random(0)
    whole, run = tmp_path / "whole" / "run", tmp_path / "killed" / "run"  # a run is called after its folder
    undisturbed = start("--config", config, "--out", whole)
    process, caught_writing = start("--config", config, "--out", run), 0
    for attempt in range(KILLS):
        caught_writing += kill_once(run, process, rng, in_write=attempt % 2 == 0)
        assert 0 < latest(run) < STEPS
        process = start("--resume", run)
    finish(process)
    finish(undisturbed)
    assert caught_writing >= 5
    assert not writing(run)
    tensors, state, records = outcome(run)
    tensors_whole, state_whole, records_whole = outcome(whole)
    assert tensors.keys() == {"model.safetensors", "ema.safetensors", "optimizer.safetensors"}
    assert tensors == tensors_whole
    assert state == state_whole
    assert records == records_whole
    assert len((run / "launches.jsonl").read_text().splitlines()) == KILLS + 1


def test_interrupted_it_leaves_a_checkpoint_one_line_and_code_2(tmp_path, config):
    run = tmp_path / "run"
    process = start("--config", config, "--out", run)
    wait_for(lambda: latest(run) >= 3, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in errors
    told = [line for line in errors.splitlines() if line.startswith("msdiff:")]
    (said,) = (line for line in told if not line.startswith("msdiff: warning:"))
    assert "interrupted" in said
    reached = latest(run)
    assert 3 <= reached < STEPS
    assert not writing(run)
    finish(start("--resume", run, "--set", f"training.steps={reached + 2}"))
    assert latest(run) == reached + 2


def interrupt(process: subprocess.Popen[str]) -> str:
    """Send Ctrl-C; return the line that says where the training stopped."""
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    (said,) = (line for line in errors.splitlines() if line.startswith("msdiff:") and "stopped" in line)
    return said


@pytest.mark.parametrize("family", ["ddpmpp", "uvit"])
def test_a_frozen_run_interrupted_ends_where_an_undisturbed_one_does(tmp_path, config, family):
    first, whole, run = tmp_path / "first", tmp_path / "whole" / "run", tmp_path / "stopped" / "run"
    if family == "uvit":
        settings = json.loads(config.read_text())
        settings["network"] = {
            name: settings["network"][name] for name in ("channels", "encoder_width", "decoder_widths")
        }
        settings["network"] |= {"family": "uvit", "encoder_depth": 1, "head_channels": 4, "size": [4, 4]}
        config.write_text(json.dumps(settings))
    short = ("training.steps=40", "evaluation.every=0")
    finish(start("--config", config, "--out", first, "--set", *short, "training.steps=4"))
    frozen = ("--config", config, "--init-from", first, "--set", "training.freeze=encoder", *short)
    process = start(*frozen, "--out", run)
    wait_for(lambda: latest(run) >= 3, process)
    said = interrupt(process)
    assert f"stopped at step {latest(run)} with a checkpoint" in said
    assert 3 <= latest(run) < 40
    finish(start("--resume", run))
    finish(start(*frozen, "--out", whole))
    assert outcome(run) == outcome(whole)

    begun = load_file(Run.open(first).checkpoint("best") / "ema.safetensors")
    for file in ("model.safetensors", "ema.safetensors"):
        ended = load_file(Run.open(run).checkpoint("latest") / file)
        encoder = [name for name in ended if ".encoders." in name]
        assert encoder
        assert all(torch.equal(ended[name], begun[name]) for name in encoder)
        assert not all(torch.equal(ended[name], begun[name]) for name in ended)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("delay", [0.0, 4.0])
def test_ctrl_c_does_not_wait_for_the_compiler(tmp_path, delay):
    run, cache = tmp_path / "run", tmp_path / "inductor"
    settings = ("execution.compile=true", "execution.thread_parallel=1", "training.steps=50", "evaluation.every=0")
    preset = ("--preset", "digits-uvit", "--set", *settings)
    process = start(*preset, "--out", run, TORCHINDUCTOR_CACHE_DIR=str(cache))
    wait_for(lambda: any(cache.rglob("*.py")), process, 300)  # the first code of a block, of many
    time.sleep(delay)
    begun = time.monotonic()
    said = interrupt(process)
    assert time.monotonic() - begun < 10  # 2 on an idle machine; the first step takes a minute more
    assert "stopped before its first step; go on with msdiff train --resume" in said
    assert latest(run) == 0
    finish(start("--resume", run, "--set", "execution.compile=false", "training.steps=2"))
    assert latest(run) == 2
