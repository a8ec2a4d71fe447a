from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loading import load

from multistage_diffusion.config.presets import preset
from multistage_diffusion.nets.cost import network_cost

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DIGITS = ["--preset", "digits", "--batch", "6", "--device", "cpu"]


@pytest.fixture(scope="module", name="paper_step")
def fixture_paper_step() -> ModuleType:
    return load(BENCHMARKS / "paper_step.py", "paper_step")


def test_a_step_is_measured_and_leaves_only_its_result(
    paper_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scratch, out = tmp_path / "scratch", tmp_path / "results" / "step.json"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.setattr(paper_step.Trainer, "save", lambda *_: pytest.fail("a checkpoint of gigabytes was written"))
    paper_step.main([*DIGITS, "--steps", "2", "--out", str(out)])
    assert not list(scratch.rglob("config.json"))  # the run is gone
    result = json.loads(out.read_text())
    assert result["parameters"] == network_cost(preset("digits").network, 8, 8).total_parameters
    assert [step["stages"] for step in result["steps"]] == [[1, 2, 3]] * 2  # a mixed batch
    assert all(0 < step["seconds"] < 60 for step in result["steps"])
    assert 0 < result["memory_mib"]["before"] <= result["memory_mib"]["peak"]
    assert set(result["machine"]) == {"device", "processor", "threads", "torch"}
    assert str(tmp_path) not in out.read_text()
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[:3] == ["preset", "params,", "M"]
    assert [line.split()[:3] for line in printed[1:3]] == [["digits", "0.7198", "6"]] * 2
    with pytest.raises(SystemExit):
        paper_step.main([*DIGITS, "--out", str(out)])
    assert f"--out {out}: exists" in capsys.readouterr().err


def test_nothing_is_written_unless_asked(
    paper_step: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paper_step, "RESULT", tmp_path / "result.json")
    paper_step.main(DIGITS)
    assert list(tmp_path.iterdir()) == []
    paper_step.main([*DIGITS, "--out"])
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_one_stage_per_step_is_named(paper_step: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    base = preset("digits")
    single = dataclasses.replace(base, training=dataclasses.replace(base.training, update_mode="one-stage"))
    monkeypatch.setattr(paper_step, "preset", lambda _: single)
    result = paper_step.measure("digits", 2, 4, torch.device("cpu"))
    assert all(len(step["stages"]) == 1 for step in result["steps"])
    assert result["update_mode"] == "one-stage"


def test_a_latent_preset_is_measured_on_its_latents(paper_step: ModuleType) -> None:
    config = paper_step.configured("celebahq-ldm", 2, 1)
    assert config.data.shape == preset("celebahq-ldm").input_shape == (3, 64, 64)
    assert not config.codec.used


def test_mistakes_are_one_clear_line(paper_step: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in ((["--preset", "digit"], "did you mean 'digits'"), (["--device", "tpu"], "device='tpu'")):
        with pytest.raises(SystemExit):
            paper_step.main(arguments)
        assert message in capsys.readouterr().err


def test_the_kept_result_is_of_the_papers_network() -> None:
    result = json.loads((BENCHMARKS / "results" / "paper_step.json").read_text())
    assert (result["preset"], round(result["parameters"] / 1e6)) == ("cifar10-dpm", 237)  # Table 7, row 1
    assert {stage for step in result["steps"] for stage in step["stages"]} == {1, 2, 3}
