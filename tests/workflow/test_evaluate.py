from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistage_diffusion.config import DataConfig, RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override, read_json, to_dict
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import PixelFeatures, evaluate_samples, load_reference, moments, read_result
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow import evaluate as evaluate_module
from multistage_diffusion.workflow.evaluate import compare, evaluate, statistics
from multistage_diffusion.workflow.sample import sample
from multistage_diffusion.workflow.train import train

COUNT = 12


def config(folder: Path, name: str = "noise", **changes: Any) -> RunConfig:
    """A run of two steps on 60 noise images of 8x8."""
    file = folder / f"{name}.npy"
    seed = sum(map(ord, name))
    np.save(file, np.random.default_rng(seed).integers(0, 256, (60, 8, 8), dtype=np.uint8))
    return override(
        preset("digits"),
        {
            "data.source": str(file),
            "data.shape": [],
            "network.encoder_width": 8,
            "network.decoder_widths": [8, 8, 8],
            "training.shares": "uniform",
            "training.batch": 6,
            "training.steps": 2,
            "training.held_out_rows": 4,
            "sampling.calls": 3,
            **{key.replace("__", "."): value for key, value in changes.items()},
        },
    )


@pytest.fixture(scope="module", name="run")
def fixture_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    return train(config(folder), folder / "run")


@pytest.mark.slow
def test_a_file_and_the_training_images_give_the_same_numbers(run: Run, tmp_path: Path) -> None:
    made = statistics(run.config().data, tmp_path / "real.npz")
    direct = to_dict(compare(run, "train", count=COUNT))
    through_file = to_dict(compare(run, tmp_path / "real.npz", count=COUNT))
    assert direct.pop("reference") == f"train of {run.config().data.source}"
    assert through_file.pop("reference") == str(tmp_path / "real.npz")
    assert through_file == direct
    training = run.data().split(0.1)[0].tensor()
    assert made.moments.count == direct["reference_count"] == len(training)
    assert torch.allclose(made.moments.mean, moments(PixelFeatures()(training)).mean)
    assert direct["samples"] == COUNT


@pytest.mark.parametrize("measure", [evaluate, compare])
def test_features_that_memory_cannot_hold_are_refused_before_samples_are_drawn(
    measure: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_module, "sample", None)
    with pytest.raises(
        UserError, match=r"count=1000000000, features='pixels' of 64 dimensions, needs at least .* smaller"
    ):
        measure(run, count=10**9)


def of_features(run: Run, folder: Path, features: str) -> Run:
    """Copy a run, with other features in its configuration."""
    copy = Run(Path(shutil.copytree(run.path, folder / "copy")))
    copy.config_file.write_text(json.dumps(to_dict(override(run.config(), {"evaluation.features": features}))))
    return copy


@pytest.mark.parametrize("measure", [evaluate, compare])
def test_the_default_features_are_those_of_the_run(measure: Any, run: Run, tmp_path: Path) -> None:
    copy = of_features(run, tmp_path, "thumbnails")
    assert measure(copy, count=COUNT).extractor == "thumbnails"
    assert measure(copy, count=COUNT, features="pixels").extractor == "pixels"


@pytest.mark.parametrize("measure", [evaluate, compare])
def test_a_script_that_only_the_run_names_is_not_loaded(
    measure: Any, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))
    torch.jit.script(torch.nn.Flatten()).save(tmp_path / "own.pt")
    copy = of_features(run, tmp_path, str(tmp_path / "own.pt"))
    with pytest.raises(UserError, match=r"own\.pt.*trust"):
        measure(copy, count=COUNT)


def test_comparisons_are_added_to_the_run(run: Run) -> None:
    file = run.path / "evaluation.json"
    before = len(read_json(file)) if file.exists() else 0
    found = compare(run, "train", count=COUNT, seed=3, features="fashion-classifier")
    evaluate(run, count=COUNT)
    entries = read_json(file)[before:]
    assert [(e["against"], e["sampling_seed"], e["step"], e["data"]) for e in entries] == [
        ("statistics", 3, 2, run.config().data.source),
        ("held-out", 0, 2, run.config().data.source),
    ]
    assert read_result(entries[0]) == found
    assert found.extractor.startswith("fashion-classifier (")


def test_an_average_of_another_width_is_measured_and_recorded(tmp_path: Path) -> None:
    settings = {"training__ema_profiles": [0.05, 0.1], "training__ema_snapshot_every": 2, "training__steps": 6}
    run = train(config(tmp_path, **settings), tmp_path / "run")
    with torch.no_grad():
        images = {ema: sample(run, COUNT, ema=ema) for ema in (None, 0.05, 0.08)}
    assert not torch.equal(images[None], images[0.08])
    assert not torch.equal(images[0.05], images[0.08])
    found = [evaluate(run, count=COUNT), evaluate(run, count=COUNT, ema=0.08), compare(run, count=COUNT, ema=0.05)]
    own, wide, narrow = read_json(run.path / "evaluation.json")
    assert "ema" not in own
    assert (wide["ema"], narrow["ema"]) == (0.08, 0.05)
    assert [read_result(entry) for entry in (own, wide, narrow)] == found
    (train_part, held_out) = run.data().split(run.config().data.held_out)
    expected = evaluate_samples(images[0.08], train_part, held_out, PixelFeatures(), metrics=("frechet",))
    assert found[1].metrics["frechet"] == expected.metrics["frechet"]
    with pytest.raises(UserError, match=r"ema=0\.3 must be above 0 and below"):
        sample(run, COUNT, ema=0.3)


def test_another_sampler_is_measured_and_recorded(run: Run) -> None:
    own = dataclasses.replace(run.config().sampling, calls=6)
    for measure in (evaluate, compare):
        found = [measure(run, count=COUNT, sampling=sampling) for sampling in ({"calls": 6}, own, None)]
        assert found[0].metrics["frechet"] == found[1].metrics["frechet"] != found[2].metrics["frechet"]
        assert [e["sampling"]["calls"] for e in read_json(run.path / "evaluation.json")[-3:]] == [6, 6, 3]


@pytest.mark.parametrize("part", ["all", "train", "held-out"])
def test_statistics_are_of_the_part_asked_for(run: Run, tmp_path: Path, part: str) -> None:
    data = run.data()
    images = {"all": data, "train": data.split(0.1)[0], "held-out": data.split(0.1)[1]}[part]
    statistics(run.config().data, tmp_path / "part.npz", part=part, keep=0)
    found = load_reference(tmp_path / "part.npz")
    assert torch.allclose(found.moments.mean, moments(PixelFeatures()(images.tensor())).mean)
    assert (found.part, found.fingerprint, found.features) == (part, data.fingerprint, None)
    assert found.held_out == (None if part == "all" else 0.1)


def test_what_does_not_fit_is_refused_before_sampling(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multistage_diffusion.workflow.evaluate.sample", lambda *_, **__: pytest.fail("sampled"))
    statistics(config(tmp_path, "others").data, tmp_path / "others.npz")
    statistics(run.config().data, tmp_path / "classified.npz", features="fashion-classifier")
    np.savez(tmp_path / "edm.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    for reference, count, message in (
        ("others.npz", COUNT, "others.npz: computed with data fingerprint"),
        (
            "classified.npz",
            COUNT,
            "classified.npz: computed with features fashion-classifier .*, but the samples have pixels",
        ),
        ("edm.npz", COUNT, "edm.npz: has 2048 feature dimensions, but pixels has 64"),
        ("none.npz", COUNT, "none.npz: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(run, tmp_path / reference, count=count)
    with pytest.raises(ValueError, match="count=3: metric 'precision-recall' needs at least 4 images"):
        compare(run, count=3)


def test_as_many_samples_are_drawn_as_the_reference_has_images(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def count_only(run: Run, count: int, **others: Any) -> torch.Tensor:
        drawn.append(count)
        return sample(run, 5, **others)

    monkeypatch.setattr("multistage_diffusion.workflow.evaluate.sample", count_only)
    np.savez(tmp_path / "edm.npz", mu=np.zeros(64), sigma=np.eye(64))
    compare(run)
    compare(run, tmp_path / "edm.npz")
    compare(run, count=77)
    assert drawn == [500, 50_000, 77]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"part": "test"}, "part='test' must be one of all, train, held-out"),
        ({"keep": -1}, "keep=-1 must be >= 0"),
        ({"features": "incepton"}, "features='incepton' is unknown"),
    ],
)
def test_statistics_of_nothing_are_not_written(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        statistics(DataConfig(source="digits"), tmp_path / "new.npz", **changes)
    assert list(tmp_path.iterdir()) == []
