"""Pushing: what is pushed, and what is said when it is not."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tiny import tiny_config, tiny_data

from multistage_diffusion import cli
from multistage_diffusion.errors import UserError
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.push import push

hub = pytest.importorskip("huggingface_hub")

FILES = {
    "README.md",
    "samples.png",
    "model_index.json",
    "pipeline_*.py",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "unet/multistage_unet_*.py",
    "scheduler/scheduler_config.json",
    "scheduler/multistage_scheduler_*.py",
}


def files(folder: Path) -> set[str]:
    """Names of a folder's files; a star stands for the digest of a file of code."""
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return {re.sub(r"_[0-9a-f]{8}\.py$", "_*.py", name) for name in found}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run.create(tmp_path / "run", tiny_config(training__steps=1))
    Trainer(made, tiny_data(), device="cpu").fit()
    return made


class Hub:
    """Notes what is asked of the hub."""

    asked: list[tuple[str, Any]]
    error: Exception | None = None

    def __init__(self) -> None:
        Hub.asked = []

    def create_repo(self, name: str, **options: Any) -> None:
        if Hub.error is not None:
            raise Hub.error
        Hub.asked.append((name, options))

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        Hub.asked.append((repo_id, files(folder_path)))


def test_a_dry_run_writes_what_would_be_pushed(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", None)  # nothing may be asked
    out = tmp_path / "out"
    command = ["push", str(run.path), "me/x", "--license", "mit", "--count", "4", "--dry-run", str(out)]
    assert cli.main(command) == 0
    assert files(out) == FILES
    assert Image.open(out / "samples.png").size[0] > 8
    card = (out / "README.md").read_text()
    assert 'license: "mit"' in card
    assert "trained for 1 steps" in card
    assert cli.main(command) == 2  # it exists
    (out / "README.md").unlink()
    assert cli.main([*command, "--overwrite"]) == 0
    assert files(out) == FILES


def test_the_card_has_only_results_of_the_weights_that_are_pushed(run: Run, tmp_path: Path) -> None:
    metrics = {"frechet": {"value": 12.3456, "real": 1.0}}
    (run.path / "evaluation.json").write_text(json.dumps([{"ema": 0.1, "metrics": metrics}]))
    push(run, "me/digits", count=1, dry_run=tmp_path / "pushed")  # another entry than a whole result would be refused
    assert "12.3" not in (tmp_path / "pushed" / "README.md").read_text()


def test_a_repository_is_made_and_gets_all_files(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub)
    assert push(run, "me/x", private=True, count=1) == "https://huggingface.co/me/x"
    assert Hub.asked == [("me/x", {"private": True, "exist_ok": True}), ("me/x", FILES)]


def test_refusals_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "HfApi", Hub)
    for name in ("x", "me/x/y", "me/..", "me/x y"):
        with pytest.raises(UserError, match="NAME="):
            push(run, name, dry_run=tmp_path / "out")
    with pytest.raises(UserError, match="--license"):
        push(run, "me/x", licence="My own", dry_run=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(Hub, "error", OSError("no route\nto host"))
    with pytest.raises(UserError, match="me/x: the hub refused or cannot be reached") as error:
        push(run, "me/x", count=1)
    assert "\n" not in str(error.value)
