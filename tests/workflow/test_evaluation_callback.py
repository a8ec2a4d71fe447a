"""Evaluation during training: its numbers, resuming to the bit, choice of the best checkpoint and of the end."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistage_diffusion import cli
from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override, read_json
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import PixelFeatures, frechet_between, frechet_distance, moments
from multistage_diffusion.files import write_json
from multistage_diffusion.samplers.class_labels import frequent_labels
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.checkpoint import checkpoint_step, list_checkpoints, load_tensors, read_state
from multistage_diffusion.training.flops import flops_per_image
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow import evaluation_callback as evaluation_callback_module
from multistage_diffusion.workflow.evaluate import statistics
from multistage_diffusion.workflow.evaluation_callback import TRAINING_IMAGES, FidReference, since_best
from multistage_diffusion.workflow.resume import resume
from multistage_diffusion.workflow.sample import sample
from multistage_diffusion.workflow.train import train

TINY: dict[str, Any] = {
    "network.encoder_width": 8,
    "network.decoder_widths": [8, 8, 8],
    "network.blocks_per_level": 1,
    "training.shares": "uniform",
    "training.batch": 6,
    "training.steps": 7,
    "training.log_every": 3,
    "training.checkpoint_every": 4,
    "training.held_out_every": 4,
    "training.held_out_rows": 4,
    "training.sample_every": 0,
    "sampling.calls": 3,
    "evaluation.every": 3,
    "evaluation.count": 20,
    "evaluation.seed": 5,
}


def tiny(folder: Path, **changes: Any) -> RunConfig:
    """A run on 60 noise images of 8x8, evaluated every 3 steps."""
    file = folder / "noise.npy"
    if not file.exists():
        np.save(file, np.random.default_rng(0).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return override(preset("digits"), {**TINY, "data.source": str(file), "data.shape": [], **changes})


def evaluated(run: Run) -> list[dict[str, Any]]:
    return [r for r in run.records() if r["kind"] == "quality"]


def steps(run: Run) -> list[int]:
    return [checkpoint_step(p) for p in list_checkpoints(run.checkpoints)]


@pytest.fixture
def distances(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let evaluations find these Fréchet distances, in turn."""
    found: list[float] = []
    monkeypatch.setattr(FidReference, "distance", lambda *_: found.pop(0))
    return found


def test_an_evaluation_measures_samples_of_the_averaged_weights(tmp_path: Path) -> None:
    config = tiny(tmp_path, training__keep_last=9, network__num_classes=0)
    run = train(config, tmp_path / "run")
    records = evaluated(run)
    assert [r["step"] for r in records] == [3, 6, 7]  # at the last step, too
    assert steps(run) == [3, 4, 6, 7]
    training, _ = run.data().split(config.data.held_out)
    for record in records:
        samples = sample(run, 20, seed=5, checkpoint=str(record["step"]))
        pixels = PixelFeatures()
        expected = frechet_distance(pixels(samples), pixels(training.tensor()))
        assert record["frechet"] == pytest.approx(expected, rel=1e-6)
        assert record["images"] == 6 * record["step"]
        assert record["petaflops"] == pytest.approx(flops_per_image(run.config()) * record["images"] / 1e15)
        assert (record["extractor"], record["count"], record["reference"]) == ("pixels", 20, TRAINING_IMAGES)
        assert read_state(run.checkpoint(str(record["step"])))["quality"] == record["frechet"]
    assert read_state(run.checkpoint("4"))["quality"] is None
    assert all(read_state(p)["score"] is not None for p in list_checkpoints(run.checkpoints))


def test_evaluations_change_nothing_that_is_trained(tmp_path: Path) -> None:
    watched = train(tiny(tmp_path), tmp_path / "watched")
    alone = train(tiny(tmp_path, evaluation__every=0), tmp_path / "alone")
    assert evaluated(alone) == []
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (load_tensors(r.checkpoint("latest"), name) for r in (watched, alone))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)


class Killed(Exception):
    """As if by a signal."""


class Dies(Callback):
    """Is killed when a record of a kind and step has been logged."""

    def __init__(self, kind: str, step: int) -> None:
        self.at = (kind, step)

    def logged(self, trainer: Trainer, record: dict[str, Any]) -> None:
        if (record["kind"], record["step"]) == self.at:
            raise Killed


def outcome(run: Run) -> tuple[dict[str, bytes], list[dict[str, Any]]]:
    records = [{k: v for k, v in r.items() if k not in ("seconds", "images_per_s")} for r in run.records()]
    return {p.name: p.read_bytes() for p in sorted(run.checkpoint("latest").iterdir())}, records


@pytest.mark.parametrize(
    ("kind", "step", "saved"),
    [
        ("quality", 3, 0),
        pytest.param("quality", 6, 4, marks=pytest.mark.slow),
        pytest.param("train", 7, 6, marks=pytest.mark.slow),
    ],
    ids=["before the first checkpoint", "between evaluation and checkpoint", "after it"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, kind: str, step: int, saved: int) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    config = tiny(tmp_path, evaluation__patience=2)
    whole = train(config, tmp_path / "a" / "run")
    with pytest.raises(Killed):
        train(config, tmp_path / "b" / "run", callbacks=[Dies(kind, step)])
    broken = Run(tmp_path / "b" / "run")
    assert (steps(broken) or [0])[-1] == saved
    assert broken.records()[-1]["step"] == step
    torch.manual_seed(123)  # another process starts from another state
    assert outcome(resume(broken.path)) == outcome(whole)


def test_a_stop_does_not_wait_for_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[Trainer] = []

    class Knows(Callback[Trainer]):
        def started(self, trainer: Trainer) -> None:
            trainers.append(trainer)

    def interrupted(*_: object, progress: Any = None, **__: object) -> torch.Tensor:
        if progress is not None:  # not the check before training
            trainers[0].stop()
            progress(1, 60)
            raise AssertionError("sampling went on")
        return torch.zeros(2, 1, 8, 8, dtype=torch.uint8)

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    config = tiny(tmp_path, training__held_out_every=3)
    with monkeypatch.context() as patched:
        patched.setattr(evaluation_callback_module, "sample_images", interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped at step 3 with a checkpoint"):
            train(config, tmp_path / "stopped" / "run", callbacks=[Knows()])
    run = Run(tmp_path / "stopped" / "run")
    assert steps(run) == [3]
    assert {record["kind"] for record in run.records()} <= {"train"}  # neither evaluated nor scored

    whole = train(config, tmp_path / "whole" / "run")
    (files, records), (expected, known) = outcome(resume(run.path)), outcome(whole)  # both are made up for
    assert files == expected
    assert sorted(map(str, records)) == sorted(map(str, known))
    assert run.checkpoint("best").name == whole.checkpoint("best").name


# -- the best, and the end --------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_the_one_of_the_lowest_distance(tmp_path: Path, distances: list[float]) -> None:
    distances += [5.0, 2.0, 4.0, 3.0]
    config = tiny(tmp_path, training__steps=12, training__keep_last=1)
    run = train(config, tmp_path / "run")
    assert run.checkpoint("best").name == "step_00000006"
    assert steps(run) == [6, 12]


@pytest.mark.slow
def test_patience_ends_training_as_if_it_was_over(tmp_path: Path, distances: list[float]) -> None:
    distances += [3.0, 1.0, 2.0, 1.0]
    run = train(tiny(tmp_path, training__steps=30, evaluation__patience=2), tmp_path / "run")
    assert [(r["step"], r["frechet"]) for r in evaluated(run)] == [(3, 3.0), (6, 1.0), (9, 2.0), (12, 1.0)]
    assert steps(run)[-1] == 12
    assert run.records()[-2]["kind"] == "train"
    assert run.records()[-1]["kind"] == "held_out"  # scored as at the last step
    before = outcome(run)
    assert outcome(resume(run.path)) == before  # it has ended
    assert outcome(resume(run.path, {"training.steps": 40, "evaluation.patience": 1})) == before
    distances += [0.5, 0.6, 0.7, 0.8]
    resume(run.path, {"evaluation.patience": 3})
    assert [r["step"] for r in evaluated(run)] == [3, 6, 9, 12, 15, 18, 21, 24]
    distances += [0.4, 0.5, 0.6]
    resume(run.path, {"evaluation.patience": 0, "training.steps": 33})
    assert [r["step"] for r in evaluated(run)][-3:] == [27, 30, 33]


@pytest.mark.slow
def test_more_patience_later_is_more_patience_from_the_start(tmp_path: Path, distances: list[float]) -> None:
    falling = [3.0, 4.0, 5.0, 6.0]
    config = tiny(tmp_path, training__steps=12, evaluation__patience=1)
    distances += falling
    short = train(config, tmp_path / "short")
    assert steps(short)[-1] == 6
    resume(short.path, {"evaluation.patience": 9, "training.steps": 12})
    distances[:] = falling
    long = train(override(config, {"evaluation.patience": 9}), tmp_path / "long")
    assert steps(short)[-1] == steps(long)[-1] == 12
    for name in ("model", "ema", "optimizer"):
        ours, theirs = (load_tensors(r.checkpoint("latest"), name) for r in (short, long))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours | theirs)


@pytest.mark.slow
def test_the_command_line_says_why_it_ended(
    tmp_path: Path, distances: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    distances += [1.0, 2.0]
    write_json(tmp_path / "config.json", tiny(tmp_path, training__steps=30, evaluation__patience=1))
    run = tmp_path / "run"
    assert cli.main(["train", "--config", str(tmp_path / "config.json"), "--out", str(run)]) == 0
    said = capsys.readouterr().err.splitlines()
    reason = (
        f"{run}: ended by patience at step 6: none below the 1 of step 3 in the last 1 Fréchet distances; a larger "
        "evaluation.patience lets it go on (--resume)"
    )
    assert said[-1] == reason
    assert "step 3: Fréchet distance 1 (pixels, 20 samples, " in "\n".join(said)
    assert cli.main(["train", "--resume", str(run)]) == 0
    assert capsys.readouterr().err.splitlines()[1:] == [reason]  # the first tells of the data


@pytest.mark.slow
def test_patience_that_runs_out_at_the_last_step_is_nothing_to_tell(tmp_path: Path, distances: list[float]) -> None:
    said: list[str] = []

    class Listens(Callback):
        def finished(self, trainer: Trainer) -> None:
            said.append(trainer.ended)

    distances += [1.0, 2.0]
    run = train(tiny(tmp_path, training__steps=6, evaluation__patience=1), tmp_path / "run", callbacks=[Listens()])
    resume(run.path, callbacks=[Listens()])
    assert said == ["", ""]
    resume(run.path, {"training.steps": 9}, callbacks=[Listens()])
    assert "ended by patience at step 6" in said[-1]


def record(step: int, frechet: float | None, kind: str = "quality") -> dict[str, Any]:
    return {"kind": kind, "step": step, "frechet": frechet}


def test_evaluations_since_the_best_one() -> None:
    assert since_best([]) == (0, None)
    assert since_best([record(1, None), record(2, None)]) == (2, None)
    known = [record(1, 5.0), record(1, 0.0, "train"), record(2, 3.0), record(3, None), record(4, 3.0)]
    assert since_best(known) == (2, known[2])
    assert since_best([*known, record(5, 2.5)]) == (0, record(5, 2.5))


# -- what may go wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.features": "inception-v9"}, r"evaluation\.features='inception-v9' is unknown; choose one of"),
        ({"sampling.guidance": 2.0}, r"sampling\.guidance=2\.0: there are no class labels"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = override(tiny(tmp_path), changes)
    with pytest.raises(ValueError, match=message) as error:
        train(config, tmp_path / "run")
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["noise.npy"]


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Statistics of the held-out noise images, named by less than their whole path."""
    monkeypatch.chdir(tmp_path)
    data = tiny(tmp_path).data
    statistics(data, "real.npz", part="held-out")
    return tmp_path / "real.npz"


@pytest.mark.slow
def test_a_reference_stands_for_the_training_images(reference: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path, training__steps=3, evaluation__reference=reference.name)
    run = train(config, tmp_path / "run")
    assert run.config().evaluation.reference == str(reference)  # a run is used from other folders too
    (record,) = evaluated(run)
    assert record["reference"] == str(reference)
    own = moments(PixelFeatures()(sample(run, 20, seed=5, checkpoint="3")))
    held_out = run.data().split(config.data.held_out)[1].tensor()
    assert record["frechet"] == pytest.approx(frechet_between(own, moments(PixelFeatures()(held_out))), rel=1e-6)
    resume(run.path, {"training.steps": 6})
    assert [r["step"] for r in evaluated(run)] == [3, 6]


def test_a_reference_that_is_missing_or_does_not_fit_is_refused(reference: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^evaluation\.reference: .*absent\.npz: no such file"):
        train(tiny(tmp_path, evaluation__reference="absent.npz"), tmp_path / "run")
    np.save(tmp_path / "others.npy", np.zeros((60, 8, 8), np.uint8))
    others = {"data.source": str(tmp_path / "others.npy"), "data.held_out": 0.0, "evaluation.reference": reference.name}
    with pytest.raises(ValueError, match=r"^evaluation\.reference: .*real\.npz: computed with data fingerprint"):
        train(override(tiny(tmp_path), others), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_images_of_too_many_pixels_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "large.npy", np.zeros((4, 80, 80), np.uint8))
    large = override(tiny(tmp_path), {"data.source": str(tmp_path / "large.npy"), "data.held_out": 0.0})
    with pytest.raises(ValueError, match=r"evaluation\.features='pixels': 6400 dimensions of images of 1 x 80 x 80"):
        train(large, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Choosy(PixelFeatures):
    """Takes no image at all."""

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        raise UserError("images: too small")


def test_images_that_the_features_do_not_take_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation_callback_module, "get_features", lambda _, named: Choosy())
    with pytest.raises(ValueError, match=r"evaluation\.features='pixels': images: too small"):
        train(tiny(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_one_training_image_is_no_reference(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", np.zeros((1, 8, 8), np.uint8))
    config = override(tiny(tmp_path), {"data.source": str(tmp_path / "one.npy"), "data.held_out": 0.0})
    with pytest.raises(
        ValueError, match=r"evaluation\.every=3 needs at least 2 training images .*, not 1; set it to 0"
    ):
        train(config, tmp_path / "run")


@pytest.mark.slow
def test_samples_that_are_not_finite_do_not_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = evaluation_callback_module.sample_images, itertools.count()

    def diverges(*args: Any, **settings: Any) -> torch.Tensor:
        if next(calls) == 1:  # 0 is the rehearsal
            raise FloatingPointError("20 of 20 samples are not finite")
        return real(*args, **settings)

    monkeypatch.setattr(evaluation_callback_module, "sample_images", diverges)
    with pytest.warns(UserWarning, match="no Fréchet distance at step 3: 20 of 20"):
        run = train(tiny(tmp_path, training__keep_last=9), tmp_path / "run")
    first, second, _ = evaluated(run)
    assert first["frechet"] is None
    assert second["frechet"] > 0
    assert json.loads(run.metrics_file.read_text().splitlines()[0])["frechet"] is None
    assert read_state(run.checkpoint("3"))["quality"] is None
    assert checkpoint_step(run.checkpoint("best")) in (6, 7)


@pytest.mark.slow
def test_evaluations_are_not_counted_in_the_training_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> float:
        time.sleep(1.0)
        return 1.0

    monkeypatch.setattr(FidReference, "distance", slow)
    start = time.perf_counter()
    run = train(tiny(tmp_path, training__steps=3, training__held_out_every=0), tmp_path / "run")
    taken = time.perf_counter() - start
    (first,) = evaluated(run)
    assert first["seconds"] >= 1.0
    assert sum(r["seconds"] for r in run.records() if r["kind"] == "train") < taken - 1.0


@pytest.mark.slow
def test_a_run_from_before_there_were_evaluations_goes_on(tmp_path: Path) -> None:
    run = train(tiny(tmp_path, evaluation__every=0, evaluation__count=1000, evaluation__seed=0), tmp_path / "run")
    state = run.checkpoint("latest") / "state.json"
    for file in (run.config_file, state):
        data = read_json(file)
        (data["config"] if file == state else data).pop("evaluation")
        data.pop("quality", None)
        write_json(file, data)
    assert run.checkpoint("best").exists()
    resume(run.path, {"training.steps": 9})
    assert evaluated(run) == []
    resume(run.path, {"training.steps": 12, "evaluation.every": 2})
    assert [r["step"] for r in evaluated(run)] == [10, 12]
    with pytest.raises(ValueError, match=r"evaluation\.count: may not change when a run is resumed"):
        resume(run.path, {"evaluation.count": 30})


def test_classes_are_evaluated_as_often_as_they_are_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.Tensor | None] = []
    real = evaluation_callback_module.sample_images
    monkeypatch.setattr(
        evaluation_callback_module, "sample_images", lambda *a, **s: asked.append(s["labels"]) or real(*a, **s)
    )
    config = override(preset("digits"), {**TINY, "training.steps": 3, "network.num_classes": 10})
    run = train(config, tmp_path / "run")
    training, _ = open_data("digits").split(config.data.held_out)
    assert run.config().data.class_counts == tuple(np.bincount(training.labels).tolist())
    assert asked[-1] is not None
    assert torch.equal(asked[-1], frequent_labels(run.config(), 20, config.evaluation.seed))
