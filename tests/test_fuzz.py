"""The fuzzer finds nothing in a few cases, and would find a fault."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
from loading import load

SCRIPT = Path(__file__).parents[1] / "scripts" / "fuzz.py"


@pytest.fixture(scope="module", name="fuzz")
def fixture_fuzz() -> ModuleType:
    return load(SCRIPT, "fuzz")


@pytest.mark.slow
def test_a_few_cases_are_clear_lines() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--cases", "100", "--seed", "7"],
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "100 cases" in done.stdout


def test_a_large_network_that_fits_into_memory_is_no_fault(fuzz: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "said.txt").write_text("training new on cpu: steps 0 to 250000, encoder 128\n")
    pid = os.fork()
    if pid == 0:
        try:
            (bytearray(os.urandom(1)) * (2 << 30), time.sleep(30))
        finally:
            os._exit(0)
    assert fuzz.watch(pid, tmp_path) == ""


def test_mutations_depend_on_the_seed_and_change_something(fuzz: ModuleType) -> None:
    json = b'{"a": [1, 2, {"b": "text"}], "c": 3.5}'
    for mutate in (fuzz.mutate_bytes, fuzz.mutate_json, fuzz.mutate_lines, fuzz.mutate_yaml):
        once = [mutate(json, random.Random(i)) for i in range(50)]
        assert once == [mutate(json, random.Random(i)) for i in range(50)]
        assert len(set(once)) > 25


@pytest.mark.parametrize(
    ("work", "fault"),
    [
        (lambda: os._exit(2), ""),
        (lambda: os._exit(1), "exit code 1"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), "dies of signal 15"),
        (lambda: (bytearray(os.urandom(1)) * (2 << 30), time.sleep(30)), "memory above 1 GiB"),
        (lambda: time.sleep(30), "hangs: 1 s"),
    ],
    ids=["fine", "code", "signal", "memory", "hang"],
)
def test_faults_are_seen(fuzz: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work, fault: str) -> None:
    if fault.startswith("hangs"):
        monkeypatch.setattr(fuzz, "WALL_SECONDS", 1)
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    assert fuzz.watch(pid, tmp_path) == fault
