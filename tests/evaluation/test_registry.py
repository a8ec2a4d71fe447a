"""One more file adds a metric, a feature extractor or a tracker; commands, training and report then use it."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from multistage_diffusion import cli
from multistage_diffusion.evaluation import FEATURES, METRICS, get_features
from multistage_diffusion.trackers.registry import TRACKERS
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.tracking import numbers
from multistage_diffusion.workflow.sample import sample, sample_labels

FEATURE = '''
"""Toy features: mean and standard deviation of the pixels."""

import torch

from multistage_diffusion.evaluation.registry import FEATURES, FeatureExtractor


@FEATURES.add("toy-features")
class Toy(FeatureExtractor):
    title, digest = "toy-features", "v1"
    comparable_to, preprocessing = "toys only", "none"

    def __call__(self, images):
        pixels = images.flatten(1).double()
        return torch.stack([pixels.mean(dim=1), pixels.std(dim=1)], dim=1)
'''
METRIC = '''
"""Toy metrics: distance of the means of features, share of equal labels."""

from multistage_diffusion.evaluation.registry import METRICS, Display, Metric, MetricValue


@METRICS.add("toy-distance")
class Distance(Metric):
    shown = (Display(name="toy_distance", label="Toy distance", words="Of the means.", better="lower", unit="px"),)
    needs = frozenset({"moments"})

    def measure(self, sets):
        distance = (sets.samples.moments.mean - sets.real.moments.mean).norm()
        return {"toy_distance": MetricValue(value=float(distance), settings={"norm": 2})}


@METRICS.add("toy-labels")
class Labels(Metric):
    shown = (Display(name="toy_labels", label="Toy zeros", better="higher", unit="%"),)
    needs = frozenset({"labels", "images"})
    against = frozenset({"held-out"})
    all_images = True

    def measure(self, sets):
        return {"toy_labels": MetricValue(value=float((sets.samples.labels == 0).double().mean()))}
'''
TRACKER = '''
"""A toy tracker: keeps its calls."""

from multistage_diffusion.trackers.registry import TRACKERS, Tracker

CALLS = []


@TRACKERS.add("toy-tracker")
class Toy(Tracker):
    def open(self, folder, step): CALLS.append(("open", folder, step))
    def config(self, config): CALLS.append(("config", config))
    def scalars(self, step, values): CALLS.append(("scalars", step, values))
    def images(self, step, grid): CALLS.append(("images", step, grid.size))
    def close(self): CALLS.append(("close",))
'''
TINY = {
    "network.encoder_width": 8,
    "network.decoder_widths": "[8,8,8]",
    "network.blocks_per_level": 1,
    "network.num_classes": 10,
    "training.shares": "uniform",
    "training.batch": 6,
    "training.steps": 2,
    "training.held_out_every": 2,
    "training.held_out_rows": 4,
    "training.sample_every": 2,
    "training.sample_count": 4,
    "sampling.calls": 3,
    "evaluation.every": 1,
    "evaluation.count": 12,
    "evaluation.features": "toy-features",
    "evaluation.metrics": "[toy-distance]",
}


@pytest.fixture(scope="module", name="toys")
def fixture_toys(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """Add one file to the folder of each kind; yield the tracker's module."""
    files = {"evaluation": {"toy_features": FEATURE, "toy_metrics": METRIC}, "trackers": {"toy_tracker": TRACKER}}
    for registry in (FEATURES, METRICS, TRACKERS):
        registry.names()
    with pytest.MonkeyPatch.context() as patch:
        for package, modules in files.items():
            folder = tmp_path_factory.mktemp(package)
            for name, text in modules.items():
                (folder / f"{name}.py").write_text(text)
            whole = importlib.import_module(f"multistage_diffusion.{package}")
            patch.setattr(whole, "__path__", [*whole.__path__, str(folder)])
        for registry in (FEATURES, METRICS, TRACKERS):
            patch.setattr(registry, "_known", dict(registry._known))
            patch.setattr(registry, "_complete", False)
        assert "toy-tracker" in TRACKERS
        yield sys.modules["multistage_diffusion.trackers.toy_tracker"]
    for name in [name for name in sys.modules if name.split(".")[-1].startswith("toy_")]:
        del sys.modules[name]


@pytest.fixture(scope="module", name="run")
def fixture_run(toys: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A class-conditional run on the digits, evaluated and tracked by toys."""
    path = tmp_path_factory.mktemp("toys") / "run"
    settings = [f"{key}={value}" for key, value in TINY.items()]
    command = ["train", "--preset", "digits", "--out", str(path), "--track", "toy-tracker", "--set", *settings]
    assert cli.main(command) == 0
    return Run.open(path)


def distance(samples: torch.Tensor, real: torch.Tensor) -> float:
    """The toy metric on the toy features, in another way."""
    gaps = []
    for statistic in (torch.mean, torch.std):
        own, other = (torch.stack([statistic(image.double()) for image in images]).mean() for images in (samples, real))
        gaps.append(float(own - other))
    return float(torch.tensor(gaps, dtype=torch.float64).square().sum().sqrt())


def evaluated(run: Run, *options: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.main(["evaluate", str(run.path), "--features", "toy-features", *options, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_they_are_known_by_name(toys: ModuleType) -> None:
    extractor = get_features("toy-features")
    assert extractor.name == "toy-features (v1)"
    assert {"toy-distance", "toy-labels", "frechet"} <= set(METRICS)


@pytest.mark.slow
def test_training_logs_a_toy_metric_on_toy_features(run: Run) -> None:
    records = [record for record in run.records() if record["kind"] == "quality"]
    assert [record["step"] for record in records] == [1, 2]
    training, _ = run.data().split(run.config().data.held_out)
    samples = sample(run, 12, seed=run.config().evaluation.seed, checkpoint="2")
    expected = distance(samples, training.tensor())
    assert records[-1]["metrics"] == {"toy_distance": pytest.approx(expected, rel=1e-6)}
    assert records[-1]["extractor"] == "toy-features (v1)"


def test_a_toy_tracker_receives_the_numbers_of_the_log(run: Run, toys: ModuleType) -> None:
    calls = [call for call in toys.CALLS if call[0] != "scalars"]
    assert calls[0] == ("open", run.path, 0)
    assert calls[1][1]["evaluation"]["metrics"] == ["toy-distance"]
    (kind, step, (width, height)), last = calls[2:]
    assert (kind, step, width, last) == ("images", 2, 2 * 65 + 1, ("close",))
    assert height > width  # captions: the class of each sample
    received = [call[1:] for call in toys.CALLS if call[0] == "scalars"]
    assert received == [(record["step"], numbers(record)) for record in run.records()]
    names = {name for _, values in received for name in values}
    assert {"quality/toy_distance", "quality/frechet", "loss/held_out/stage 3", "lr"} <= names


@pytest.mark.slow
def test_evaluate_computes_toy_metrics(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    _, held_out = run.data().split(run.config().data.held_out)
    result = evaluated(run, "--count", str(len(held_out)), capsys=capsys)
    assert set(result["metrics"]) == {"frechet", "precision", "recall", "memorised", "toy_distance", "toy_labels"}
    samples = sample(run, len(held_out))
    found = result["metrics"]["toy_distance"]
    assert found["value"] == pytest.approx(distance(samples, held_out.tensor()), rel=1e-9)  # sets are drawn whole
    assert 0 < found["real"] < found["value"]
    labels = sample_labels(run.config(), len(held_out))
    assert labels is not None
    assert result["metrics"]["toy_labels"]["value"] == pytest.approx(float((labels == 0).double().mean()))
    training, _ = run.data().split(run.config().data.held_out)
    assert training.labels is not None
    assert result["metrics"]["toy_labels"]["real"] == pytest.approx(float((training.labels == 0).mean()))
    against = evaluated(run, "--against", "train", "--count", "12", "--metrics", "toy-distance", capsys=capsys)
    expected = distance(sample(run, 12), training.tensor())
    assert list(against["metrics"]) == ["toy_distance"]
    assert against["metrics"]["toy_distance"]["value"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_the_report_shows_toy_metrics(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluated(run, "--count", "12", capsys=capsys)
    value = result["metrics"]["toy_distance"]["value"]
    assert cli.main(["report", str(run.path), "--count", "4"]) == 0
    page = (run.path / "report.html").read_text()
    for words in ("Toy distance of samples during training", f"{value:.4g} px", "norm = 2", "Lower is better. Of the"):
        assert words in page
    assert "toy-features (v1)" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("evaluation.metrics=[toys]", r"evaluation.metrics='toys' must be one of frechet, .*toy-distance"),
        ("evaluation.metrics=[toy-labels]", "evaluation.metrics='toy-labels': is computed against held-out only"),
        (
            "evaluation.metrics=[precision-recall]",
            "evaluation.count=3: metric 'precision-recall' needs at least 4 images",
        ),
    ],
)
def test_metrics_that_cannot_be_logged_are_refused(
    change: str, message: str, toys: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [f"{key}={value}" for key, value in {**TINY, "evaluation.count": 3}.items()]
    out = tmp_path / "run"
    assert cli.main(["train", "--preset", "digits", "--out", str(out), "--set", *settings, change]) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not out.exists()
