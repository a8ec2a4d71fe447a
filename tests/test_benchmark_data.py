from __future__ import annotations

import json
import os
import subprocess
import sys
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


@pytest.mark.slow
def test_the_whole_run_writes_its_figures(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(FILE.parents[1] / "src")}
    out = tmp_path / "data.json"
    small = ["--count", "60", "--size", "24", "--rounds", "2", "--batch", "8"]
    command = [sys.executable, str(FILE), *small, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    told = json.loads(out.read_text())
    assert {"bare", "first", "second", "drawn"} <= set(told["measures"])
    assert told["first_to_bare"] > 0
    assert "first opening / bare loop" in done.stdout
    assert str(tmp_path) not in out.read_text()
