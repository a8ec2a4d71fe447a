"""From images to a report in one call."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from multistage_diffusion.config import DataConfig
from multistage_diffusion.errors import UserError
from multistage_diffusion.reporting.pictures import grid
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.checkpoint import checkpoint_step
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.auto import AutoConfig
from multistage_diffusion.workflow.evaluate import evaluate
from multistage_diffusion.workflow.quickstart import quickstart, step_of_picture
from multistage_diffusion.workflow.resume import resume

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
def silent(title: str, unit: str) -> Iterator[None]:
    yield None


@pytest.fixture
def images(tmp_path: Path) -> str:
    np.save(tmp_path / "images.npy", (load_digits().images[:200] * 255 / 16).astype(np.uint8))
    return str(tmp_path / "images.npy")


@pytest.mark.slow
def test_all_steps_are_run_and_an_interrupted_training_is_continued(crops: Path, tmp_path: Path) -> None:
    out, told = tmp_path / "run", list[AutoConfig]()
    config = {**SMALL, "data.size": (16, 16), "data.held_out": 0.2, "training.steps": 3}
    quickstart(str(crops), out, config, bar=silent, device="cpu", tell=told.append)
    page, scores = quickstart(str(crops), out, {"training.steps": 6}, bar=silent, device="cpu", tell=told.append)
    assert Run(out).config().data.shape == (3, 16, 16)
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
    def counted(title: str, unit: str) -> Iterator[None]:
        bars.append(title)
        yield None

    page, scores = quickstart(images, out, config, bar=counted, device="cpu")
    assert bars == ["encoding", "sampling", "evaluating", "reporting"]
    bars.clear()
    assert quickstart(images, out, config, bar=counted, device="cpu") == (page, scores)
    assert bars == []
    (out / "evaluation.json").touch()
    assert quickstart(images, out, config, bar=counted, device="cpu") == (page, scores)
    assert bars == ["reporting"]
    (out / "samples.png").unlink()
    bars.clear()
    quickstart(images, out, config, bar=counted, device="cpu")
    assert (out / "samples.png").exists()
    assert bars == ["sampling", "reporting"]
    bars.clear()
    assert quickstart(images, out, {**config, "training.steps": 5}, bar=counted, device="cpu")[1] != scores
    assert bars == ["sampling", "evaluating", "reporting"]


def test_only_an_evaluation_with_the_defaults_is_shown_again(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORED", 30)
    out, config = tmp_path / "run", {**SMALL, "training.steps": 3, "data.held_out": 0.2}
    config |= {"training.ema_profiles": [0.1, 0.2], "training.ema_snapshot_every": 1}
    _, scores = quickstart(images, out, config, bar=silent, device="cpu")
    assert scores is not None
    np.save(tmp_path / "others.npy", np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    others = DataConfig(source=str(tmp_path / "others.npy"), held_out=0.5)
    for changes in ({"ema": 0.15}, {"metrics": ("frechet",)}, {"seed": 1}, {"data": others}):
        found = evaluate(out, count=30, device="cpu", **changes)
        assert quickstart(images, out, config, bar=silent, device="cpu")[1] == scores != found
    sampler = dataclasses.replace(Run(out).config().sampling, calls=4)
    evaluate(out, count=30, sampling=sampler, device="cpu")
    assert quickstart(images, out, config, bar=silent, device="cpu")[1] == scores
    launches = (out / "launches.jsonl").read_text()
    assert launches.count("\n") == 1  # what is complete is not trained again


def test_the_picture_is_of_the_step_that_is_evaluated(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORED", 30)
    out, config = tmp_path / "run", {**SMALL, "training.steps": 3, "data.held_out": 0.2}
    quickstart(images, out, config, bar=silent, device="cpu")
    assert step_of_picture(out / "samples.png") == 3
    first = (out / "samples.png").read_bytes()
    resume(out, {"training.steps": 5}, device="cpu")
    evaluate(out, count=30, device="cpu")
    quickstart(images, out, {**config, "training.steps": 5}, bar=silent, device="cpu")
    assert step_of_picture(out / "samples.png") == checkpoint_step(Run(out).checkpoint("best"))
    assert ((out / "samples.png").read_bytes() == first) == (step_of_picture(out / "samples.png") == 3)
    (out / "samples.png").write_bytes(b"mine")
    assert step_of_picture(out / "samples.png") is None


def test_without_held_out_images_there_is_a_report_and_no_evaluation(images: str, tmp_path: Path) -> None:
    config = {**SMALL, "training.steps": 3, "data.held_out": 0.0}
    with pytest.warns(UserWarning, match="not evaluated: no images are held out; give a new run a larger --held-out"):
        page, scores = quickstart(images, tmp_path / "run", config, bar=silent, device="cpu")
    assert scores is None
    assert page.stat().st_size > 0


def test_unknown_features_are_told_before_the_training(images: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="features='foo' is unknown"):
        quickstart(images, tmp_path / "run", {**SMALL, "evaluation.features": "foo"}, bar=silent, device="cpu")
    assert not (tmp_path / "run").exists()


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


@pytest.mark.parametrize("step", ["auto_config", "sample", "evaluate", "report"])
def test_an_interruption_anywhere_says_that_the_same_command_goes_on(
    step: str, images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, step, interrupted)
    config = {**SMALL, "training.steps": 2, "data.held_out": 0.2}
    with pytest.raises(KeyboardInterrupt, match=r"^interrupted; the same command goes on$"):
        quickstart(images, tmp_path / "run", config, bar=silent, device="cpu")


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
    with pytest.raises(UserError, match=r"run: holds a run with training\.batch=9, not 12; choose another --out"):
        quickstart(images, tmp_path / "run", {**config, "training.batch": 12}, bar=silent, device="cpu")


def test_of_few_held_out_images_what_can_be_measured_is(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORED", 20)
    np.save(tmp_path / "few.npy", np.load(images)[:12])
    config = {**SMALL, "training.steps": 2}
    with pytest.warns(UserWarning, match="is left out"):
        _, scores = quickstart(str(tmp_path / "few.npy"), tmp_path / "run", config, bar=silent, device="cpu")
    assert scores is not None
    assert "memorised" in scores.metrics
    assert "precision" not in scores.metrics
    assert scores.samples == 20


def test_the_grid_of_classes_has_their_names(crops: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SCORED", 20)
    captions = list[object]()
    monkeypatch.setattr(
        module, "grid", lambda pictures, captions_=captions, **k: (captions_.append(k), grid(pictures, **k))[1]
    )
    config = {**SMALL, "data.size": (8, 8), "data.held_out": 0.2, "training.steps": 2, "network.num_classes": 2}
    quickstart(str(crops), tmp_path / "run", config, bar=silent, device="cpu")
    assert captions == [{"captions": ["china", "flower"] * 50}]  # in turn
