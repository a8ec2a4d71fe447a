from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from loading import load

from multistage_diffusion.data import rows
from multistage_diffusion.data.sources import open_data

FILE = Path(__file__).parents[1] / "benchmarks" / "data.py"


@pytest.fixture(name="data", scope="module")
def fixture_data() -> ModuleType:
    return load(FILE, "benchmark_data")


def test_every_measure_measures_all_images(data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "IN_MEMORY", rows.IN_MEMORY)  # one measure sets it
    for number in range(data.CLASSES):
        (tmp_path / f"class-{number}").mkdir()
    for number in range(20):
        data._make(tmp_path, 16, number)
    images = open_data(tmp_path)
    assert (len(images), images.shape, images.num_classes) == (20, (3, 16, 16), 10)
    assert len(np.unique(images.array()[:, 0, 8, 8])) > 5
    assert data._decode([str(path) for path in tmp_path.rglob("*.jpg")]) == 20
    assert data.opened(tmp_path, 4)["seconds"] > 0
    for in_memory in (True, False):
        assert data.drawn(tmp_path, 4, in_memory=in_memory)["rows_per_second"] > 0


def test_ratios_are_of_one_round_and_figures_medians(data: ModuleType) -> None:
    found = {
        "bare": [{"seconds": 1.0}, {"seconds": 10.0}, {"seconds": 2.0}],
        "first": [{"seconds": 3.0}, {"seconds": 15.0}, {"seconds": 4.0}],
        "drawn": [{"rows_per_second": 5.0}],
    }
    told = data.summary(found)
    assert told["measures"]["bare"] == {"seconds": 2.0}
    assert told["first_to_bare"] == 2.0
    assert told["drawn_to_torchvision"] is None
    text = data.report({"images": 3, "size": 8, "rounds": 3, **told})
    assert "first opening / bare loop: 2.00\ntorchvision is not installed" in text


def test_memory_below_a_process_is_found(data: ModuleType) -> None:
    script = "import subprocess, sys; x = bytearray(b'1') * (64 << 20); subprocess.run([sys.executable, '-c', {!r}])"
    child = "x = bytearray(b'1') * (128 << 20); print(1, flush=True); input()"
    command = [sys.executable, "-c", script.format(child)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()  # both hold their memory
        watch = data.Watch(process.pid)
        watch.start()
        time.sleep(2.5)
        process.stdin.write(b"\n")
    assert 192 < watch.end() < 256
    assert data._pages(process.pid, "Rss:") == 0.0


def test_a_photo_is_decoded_smaller_and_whole_to_nearly_the_same(
    data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "PHOTO", (640, 960))
    monkeypatch.setattr(data, "REPEATS", 3)
    found = data.drafted(tmp_path, 0)
    assert found["megapixels"] == pytest.approx(0.6144)
    assert found["whole_ms"] > found["reduced_ms"] > 0
    assert 0 < found["grey_levels_apart"] < 1
    assert "draft   megapixels 0.61, reduced ms" in data.told("draft", {"machine": {}, **found})


@pytest.mark.slow
def test_the_memory_of_both_trainings_is_measured(data: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "data.json"
    out.write_text('{"images": 3, "memory": 1}')
    environment = {**os.environ, "PYTHONPATH": str(FILE.parents[1] / "src")}
    small = ["--parts", "memory", "--count", "270", "--size", "16", "--steps", "2"]
    command = [sys.executable, str(FILE), *small, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    told = json.loads(out.read_text())
    assert told["images"] == 3  # parts that are not run keep their figures
    assert (told["memory"]["few"]["images"], told["memory"]["many"]["images"]) == (data.FEW, 270)
    for figures in (told["memory"]["few"], told["memory"]["many"]):
        assert figures["opened_per_second"] > 0
        assert 100 < figures["process_mib"] < 4096
        assert figures["all_processes_mib"] > 100
    assert done.stdout.count("all processes mib") == 2


@pytest.mark.slow
def test_the_whole_run_writes_its_figures(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FILE.parents[1] / "src")}
    out = tmp_path / "data.json"
    small = ["--parts", "open", "--count", "60", "--size", "24", "--rounds", "2", "--batch", "8"]
    command = [sys.executable, str(FILE), *small, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    told = json.loads(out.read_text())
    assert {"bare", "first", "second", "drawn"} <= set(told["measures"])
    assert told["first_to_bare"] > 0
    assert "first opening / bare loop" in done.stdout
    assert str(tmp_path) not in out.read_text()
