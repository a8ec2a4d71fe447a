"""The benchmark of digits-uvit beside digits keeps its results and does not train again what it knows."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from loading import load

FILE = Path(__file__).parents[1] / "benchmarks" / "digits_uvit.py"


@pytest.fixture(name="bench", scope="module")
def fixture_bench() -> ModuleType:
    return load(FILE, "digits_uvit")


def test_means_are_over_the_seeds_that_both_have(bench: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def runs(**found: tuple[float, float]) -> dict[str, dict[str, float]]:
        return {seed[1:]: {"frechet": a, "cpu_seconds": b} for seed, (a, b) in found.items()}

    bench.report({"digits": runs(s0=(1, 10), s1=(3, 30), s2=(100, 1)), "digits-uvit": runs(s0=(2, 30), s1=(3, 30))})
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "frechet of digits-uvit, mean of 2 seeds, relative to digits: 1.250",
        "cpu_seconds of digits-uvit, mean of 2 seeds, relative to digits: 1.500",
    ]


@pytest.mark.slow
def test_both_presets_are_trained_once(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--seeds", "3", "--count", "40", "--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "x.json")]
    changes = {"training.steps": 2, "training.batch": 6, "sampling.calls": 3, "training.held_out_every": 0}
    bench.main(arguments, changes)
    known = json.loads((tmp_path / "x.json").read_text())
    assert list(known) == list(bench.PRESETS)
    for runs in known.values():
        assert runs["3"]["frechet"] > 0
        assert runs["3"]["cpu_seconds"] > 0
        assert runs["3"]["held_out"]["real"] > 0
    monkeypatch.setattr(bench, "measured", lambda *_: pytest.fail("trained again"))
    bench.main(arguments, changes)
    assert "relative to digits" in capsys.readouterr().out
