"""The demo does the whole job; in the slow test, its digits are as good as real ones by four measures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.errors import UserError
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.demo import demo
from multistage_diffusion.workflow.evaluate import evaluate
from multistage_diffusion.workflow.sample import sample

TINY = {
    "training.steps": 6,
    "training.batch": 9,
    "training.held_out_rows": 4,
    "training.checkpoint_every": 3,
    "training.log_every": 3,
    "sampling.calls": 3,
}


@contextmanager
def silent(title: str, unit: str) -> Iterator[None]:
    yield None


@pytest.mark.slow
def test_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo(out, {**TINY, "training.steps": 3}, bar=silent)
    page, scores = demo(out, {**TINY, "training.steps": 6}, bar=silent)
    assert page == out / "report.html"
    for name in ("report.html", "samples.png", "stages.json", "stages.png", "evaluation.json"):
        assert (out / name).stat().st_size > 0
    assert [r["step"] for r in Run(out).records() if r["kind"] == "train"] == [3, 6]
    assert [e["step"] for e in json.loads((out / "evaluation.json").read_text())] == [3, 6]
    assert 0 <= scores.metrics["memorised"].value <= 1


def test_refuses_to_go_on_with_another_run(tmp_path: Path) -> None:
    config = override(preset("digits"), {**TINY, "optimizer.lr": 0.5, "training.batch": 48})
    run = Run.create(tmp_path / "mine", config)
    with pytest.raises(
        UserError,
        match=r"mine: holds a run with .*optimizer.lr=0.5, not .*; training.batch=48, not 9; choose another --out",
    ):
        demo(run.path, TINY, bar=silent)
    assert sorted(p.name for p in run.path.iterdir()) == ["config.json"]


def distances_to_class(
    points: npt.NDArray[np.float64],
    classes: npt.NDArray[np.int64],
    real: npt.NDArray[np.float64],
    own: npt.NDArray[np.int64],
) -> npt.NDArray[np.float64]:
    """Return every point's distance to the nearest real image of the class it was taken for."""
    squared = ((points[:, None] - real[None]) ** 2).sum(-1)
    squared[classes[:, None] != own[None]] = np.inf
    return np.sqrt(squared.min(1))


@pytest.mark.slow
def test_digits_look_like_digits(tmp_path: Path) -> None:
    from sklearn.svm import SVC

    page, _ = demo(tmp_path / "demo", bar=silent)
    assert page.exists()
    run = Run.open(tmp_path / "demo")
    scores = evaluate(run, count=500, seed=1)
    assert scores.splits == 5
    assert scores.count == scores.reference_count
    distance, copies = scores.metrics["frechet"], scores.metrics["memorised"]
    assert distance.value <= 1.5 * distance.real
    assert copies.value <= copies.real + 0.05

    train, held_out = run.data().split(0.1)
    assert train.labels is not None
    real, test = (part.array().reshape(len(part), -1) / 255.0 for part in (train, held_out))
    classifier = SVC().fit(real, train.labels)
    assert classifier.score(test, held_out.labels) > 0.97
    usual = np.quantile(distances_to_class(test, classifier.predict(test), real, train.labels), 0.95)
    made = sample(run, 500, seed=2).numpy().reshape(500, -1) / 255.0
    classes = classifier.predict(made)
    assert (distances_to_class(made, classes, real, train.labels) <= usual).mean() >= 0.75
    shares = np.bincount(classes, minlength=10) / len(classes)
    assert shares.min() >= 0.03
    assert shares.max() <= 0.20
