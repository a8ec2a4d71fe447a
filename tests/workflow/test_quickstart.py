"""From images to a report in one call."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from multistage_diffusion.errors import UserError
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.auto import AutoConfig
from multistage_diffusion.workflow.quickstart import quickstart

module = sys.modules[quickstart.__module__]

SMALL = {
    "network.encoder_width": 16,
    "network.decoder_widths": [16, 16, 16],
    "training.batch": 9,
    "training.held_out_rows": 4,
    "training.checkpoint_every": 3,
    "training.sample_every": 0,
    "evaluation.every": 0,
    "sampling.calls": 3,
}


@contextmanager
def silent(title: str) -> Iterator[None]:
    yield None


@pytest.fixture
def images(tmp_path: Path) -> str:
    np.save(tmp_path / "images.npy", (load_digits().images[:200] * 255 / 16).astype(np.uint8))
    return str(tmp_path / "images.npy")


@pytest.mark.slow
def test_all_steps_are_run_and_an_interrupted_training_is_continued(images: str, tmp_path: Path) -> None:
    out, told = tmp_path / "run", list[AutoConfig]()
    quickstart(images, out, {**SMALL, "training.steps": 3}, bar=silent, device="cpu", tell=told.append)
    page, scores = quickstart(images, out, {"training.steps": 6}, bar=silent, device="cpu", tell=told.append)
    assert len(told) == 1  # what continues is not chosen again
    assert page == out / "report.html"
    for name in ("report.html", "samples.png", "stages.json", "stages.png", "evaluation.json"):
        assert (out / name).stat().st_size > 0
    assert Run(out).records()[-1]["step"] == 6
    assert "frechet" in scores.metrics


def test_a_finished_run_is_not_sampled_again(images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCORED", 30)
    out, config, bars = tmp_path / "run", {**SMALL, "training.steps": 3, "data.held_out": 0.2}, list[str]()

    @contextmanager
    def counted(title: str) -> Iterator[None]:
        bars.append(title)
        yield None

    page, scores = quickstart(images, out, config, bar=counted, device="cpu")
    assert bars == ["finding stages", "sampling", "evaluating", "reporting"]
    bars.clear()
    assert quickstart(images, out, config, bar=counted, device="cpu") == (page, scores)
    assert bars == ["reporting"]
    (out / "samples.png").unlink()
    quickstart(images, out, config, bar=silent, device="cpu")
    assert (out / "samples.png").exists()
    bars.clear()
    assert quickstart(images, out, {**config, "training.steps": 5}, bar=counted, device="cpu")[1] != scores
    assert bars == ["sampling", "evaluating", "reporting"]


def test_what_is_stopped_says_that_the_same_command_goes_on(images: str, tmp_path: Path) -> None:
    out, config = tmp_path / "run", {**SMALL, "training.steps": 4}

    class Stop(Callback[Trainer]):
        def stepped(self, trainer: Trainer) -> None:
            trainer.stop()

    for step in (1, 2):  # begun, then resumed
        with pytest.raises(
            KeyboardInterrupt, match=rf"run: stopped at step {step} with a checkpoint; the same command goes on$"
        ):
            quickstart(images, out, config, bar=silent, device="cpu", callbacks=[Stop()])


def test_a_run_on_other_images_is_refused(images: str, tmp_path: Path) -> None:
    config = {**SMALL, "training.steps": 3}
    quickstart(images, tmp_path / "run", config, bar=silent, device="cpu")
    np.save(tmp_path / "other.npy", np.zeros((20, 8, 8), np.uint8))
    with pytest.raises(
        UserError, match=r"run: holds a run with data\.source=.*images\.npy, not .*; choose another --out"
    ):
        quickstart(str(tmp_path / "other.npy"), tmp_path / "run", config, bar=silent, device="cpu")
    with pytest.raises(
        UserError, match=r"run: holds a run with data\.size=\[8, 8\], not \[12, 12\]; choose another --out"
    ):
        quickstart(images, tmp_path / "run", {**config, "data.size": (12, 12)}, bar=silent, device="cpu")
