"""The benchmark of many processes: its measured bytes are the formula's, and the model in the docs is what it prints."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from loading import load

from multistage_diffusion.config.serialization import read_json

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", name="bench")
def fixture_bench() -> ModuleType:
    return load(ROOT / "benchmarks" / "distributed.py", "distributed_benchmark")


@pytest.mark.slow
def test_the_model_in_the_docs_is_what_it_prints(bench: ModuleType) -> None:
    page = (ROOT / "docs" / "distributed.md").read_text()
    assert bench.model() in page


@pytest.mark.slow
def test_bytes_are_counted_and_equal_the_formula(bench: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    bench.main(["--processes", "2", "--batch", "12", "--steps", "3", "--out", str(out)])
    found = read_json(out)["strategies"]
    assert found.keys() == {"time", "memory", "ddp"}
    for strategy in ("time", "memory"):
        for rank in found[strategy]:
            assert rank["held"] == rank["held_by_formula"]
            assert rank["reduced"] == rank["reduced_by_formula"]
    assert found["ddp"][0]["reduced"] == found["time"][0]["reduced"] > found["memory"][0]["reduced"]
