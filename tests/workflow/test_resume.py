from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from multistage_diffusion import override, preset, train
from multistage_diffusion.cli import main
from multistage_diffusion.trackers.registry import track
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.resume import resume


@pytest.fixture
def images(tmp_path: Path) -> str:
    np.save(tmp_path / "images.npy", (load_digits().images[:100] * 255 / 16).astype(np.uint8))
    return str(tmp_path / "images.npy")


@pytest.fixture(name="launched")
def fixture_launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trackers of each training that would have been launched."""
    found: list[Any] = []

    def launch(*_: object, trackers: Any, **__: object) -> Any:
        found.append(trackers)
        return Run("run")  # type: ignore[arg-type]

    monkeypatch.setattr("multistage_diffusion.workflow.resume.launch", launch)
    return found


def test_a_resumed_run_has_its_trackers_unless_others_are_named(
    launched: list[Any], tmp_path: Any, tiny_config: Any
) -> None:
    run = Run.create(tmp_path / "run", tiny_config())
    resume(run.path)
    track(run.path, ("wandb", "trackio"))
    resume(run.path)
    resume(run.path, trackers=())
    for options in ((), ("--track", "tensorboard"), ("--track", "none")):
        assert main(["train", "--resume", str(run.path), *options]) == 0
    assert launched == [(), ("wandb", "trackio"), (), ("wandb", "trackio"), ("tensorboard",), ()]


def test_what_changes_is_told(tmp_path: Path, images: str, caplog: pytest.LogCaptureFixture) -> None:
    config = override(preset("digits"), {"data.source": images, "training.steps": 1, "training.batch": 9})
    run = train(config, tmp_path / "run", device="cpu")
    caplog.set_level(logging.INFO)
    resume(run.path, {"training.steps": 2, "training.log_every": 1}, device="cpu")
    before = config.training.log_every
    assert f"{run.path}: resuming with training.steps=2 (was 1), training.log_every=1 (was {before})" in caplog.messages
    caplog.clear()
    resume(run.path, {"training.steps": 2}, device="cpu")
    assert not [text for text in caplog.messages if "resuming with" in text]
