from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistage_diffusion.cli import main
from multistage_diffusion.config import DataConfig, RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import from_dict, override, read_json, to_dict
from multistage_diffusion.config.training import ExecutionConfig
from multistage_diffusion.data import ImageData
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import read_result
from multistage_diffusion.files import write_json
from multistage_diffusion.reporting.describe import describe
from multistage_diffusion.stage_finding import StageResult, StageSettings
from multistage_diffusion.training.callbacks import Callback
from multistage_diffusion.training.checkpoint import list_checkpoints
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow import sample as sample_module
from multistage_diffusion.workflow.differences import CHANGEABLE
from multistage_diffusion.workflow.evaluate import evaluate
from multistage_diffusion.workflow.report import report
from multistage_diffusion.workflow.resolve import resolve_run
from multistage_diffusion.workflow.resume import resume
from multistage_diffusion.workflow.sample import sample, sample_labels
from multistage_diffusion.workflow.stages import find_stages
from multistage_diffusion.workflow.train import train

TINY: dict[str, Any] = {
    "network.encoder_width": 8,
    "network.decoder_widths": [8, 8, 8],
    "network.blocks_per_level": 1,
    "training.shares": "uniform",
    "training.batch": 6,
    "training.steps": 4,
    "training.log_every": 2,
    "training.checkpoint_every": 2,
    "training.held_out_every": 2,
    "training.held_out_rows": 4,
    "training.sample_every": 0,
    "sampling.calls": 6,
}


def tiny(**changes: Any) -> RunConfig:
    return override(preset("digits"), TINY | {key.replace("__", "."): value for key, value in changes.items()})


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return open_data("digits")


@pytest.fixture(scope="module")
def result() -> StageResult:
    return find_stages("digits", StageSettings(samples=200))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, result: StageResult) -> Run:
    return train(tiny(), tmp_path_factory.mktemp("runs") / "run", result=result)


def noise(folder: Path, config: RunConfig, *shape: int) -> RunConfig:
    """Store random images (N, H, W[, C]) and return the configuration that names them."""
    np.save(folder / "noise.npy", np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    return override(config, {"data.source": str(folder / "noise.npy"), "data.shape": []})


def images(count: int, *shape: int) -> ImageData:
    pixels = np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8)
    return ImageData(pixels, None, "noise")


# -- stages -----------------------------------------------------------------------------------------------------------


def test_a_split_leaves_held_out_images_out(digits: ImageData, result: StageResult) -> None:
    training, _ = digits.split(0.1)
    assert result.fingerprint == training.fingerprint
    alone = find_stages(training, StageSettings(samples=200))
    assert dataclasses.replace(alone, data_fingerprint=result.data_fingerprint) == result
    assert (result.data_fingerprint, alone.data_fingerprint) == (digits.fingerprint, training.fingerprint)
    assert find_stages("digits", StageSettings(samples=200, seed=1)).edges_sigma != result.edges_sigma


def test_a_split_is_written_with_its_picture(tmp_path: Path) -> None:
    data = images(20, 1, 4, 4)
    found = find_stages(data, StageSettings(samples=100, algorithm=2, stages=2), out=tmp_path / "new" / "s.json")
    assert StageResult.load(tmp_path / "new" / "s.json") == found
    assert (tmp_path / "new" / "s.png").read_bytes().startswith(b"\x89PNG")


# -- preparing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.batch": 2}, "training.batch=2 is too small for 3 stages"),
        ({"sampling.eta": 0.5}, "sampling.eta=0.5 has no meaning"),
        ({"network.num_classes": 10}, "has no labels"),
        ({"network.channel_mult": [1] * 10}, "has 10 levels"),
        (
            {"training.branch_at": 2, "network.decoder_widths": [20, 16, 8]},
            r"network.decoder_widths=\[20, 16, 8\]: the decoder of width 16 is no slice of that of width 20.*training.branch_at",
        ),
        ({"training.steps": 4}, "device='cuda:99'"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=message):
        train(
            override(noise(tmp_path, tiny(), 40, 8, 8), changes),
            tmp_path / "run",
            replace=True,
            device="cuda:99" if "training.steps" in changes else "cpu",
        )
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["mine", "noise.npy", "run"]


def test_a_preset_without_data_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"data.source is empty: preset 'cifar10-dpm' names no data; give --data"):
        train(preset("cifar10-dpm"), tmp_path / "run")


def test_edges_of_other_data_are_refused_unless_borrowed(result: StageResult, tmp_path: Path) -> None:
    config = noise(tmp_path, tiny(training__steps=1), 40, 8, 8)
    with pytest.raises(UserError, match=r"--stages: they were found on other images.*--borrow"):
        train(config, tmp_path / "run", result=result)
    assert not (tmp_path / "run").exists()
    assert train(config, tmp_path / "run", result=result, borrow=True).config().stages == result.stages()


def test_another_held_out_share_is_the_same_images(tmp_path: Path) -> None:
    config = noise(tmp_path, tiny(training__steps=1), 40, 8, 8)
    source = DataConfig(source=config.data.source, held_out=0.5)
    result = find_stages(source, StageSettings(algorithm=2, samples=100))
    assert result.fingerprint != result.data_fingerprint
    train(config, tmp_path / "run", result=result)
    even = find_stages("digits", StageSettings(algorithm="snr"))  # the same for all images
    train(config, tmp_path / "even", result=even)


# -- training and resuming --------------------------------------------------------------------------------------------


def test_a_run_holds_all_that_it_came_from(run: Run, result: StageResult, digits: ImageData) -> None:
    config = run.config()
    given = override(tiny(), {"stages": result.stages(), "name": "run"})
    assert config == resolve_run(given, digits, result, torch.device("cpu")).config
    assert StageResult.load(run.path / "stages.json") == result
    assert (run.path / "stages.png").read_bytes().startswith(b"\x89PNG")
    assert [(r["kind"], r["step"]) for r in run.records()] == [
        ("train", 2),
        ("held_out", 2),
        ("train", 4),
        ("held_out", 4),
    ]


def final_files(run: Run) -> dict[str, bytes]:
    folder = run.checkpoint("latest")
    return {p.name: p.read_bytes() for p in folder.glob("*.safetensors")}


def test_a_longer_training_is_one_that_was_long_from_the_start(run: Run, result: StageResult, tmp_path: Path) -> None:
    short = train(tiny(training__steps=2), tmp_path / "run", result=result)
    longer = resume(short.path, {"training.steps": 4, "training.keep_last": 1})
    assert longer.config().training.steps == 4
    assert final_files(longer) == final_files(run)
    assert [r["loss"] for r in longer.records()] == [r["loss"] for r in run.records()]
    assert len(list_checkpoints(longer.checkpoints)) <= 2  # the latest and the best


def test_a_finished_run_stays_as_it_is(run: Run) -> None:
    before = final_files(run)
    resume(run.path)
    assert final_files(run) == before


def test_only_length_and_records_may_change(run: Run) -> None:
    before = run.config_file.read_bytes()
    for changes in (
        {"optimizer.lr": 0.1},
        {"training.batch": 12, "training.steps": 8},
        {"stages.interior": [1.0, 2.0]},
        {"data.held_out": 0.2},
    ):
        with pytest.raises(
            ValueError,
            match=r"may not change when a run is resumed; start a new run, or change only data.source, data.class_names",
        ):
            resume(run.path, changes)
    resume(run.path, {"optimizer.lr": run.config().optimizer.lr})  # the same again is no change
    assert run.config_file.read_bytes() == before


def test_how_steps_are_computed_may_change(run: Run) -> None:
    assert {f"execution.{field.name}" for field in dataclasses.fields(ExecutionConfig)} < set(CHANGEABLE)
    resume(run.path, {"execution.recompute": True, "execution.channels_last": True})
    assert run.config().execution == ExecutionConfig(recompute=True, channels_last=True)
    before = run.config_file.read_bytes()
    with pytest.raises(
        ValueError, match=r"execution\.cuda_graphs=True needs one process on a CUDA device, not 1 on cpu"
    ):
        resume(run.path, {"execution.cuda_graphs": True, "execution.recompute": False}, device="cpu")
    assert run.config_file.read_bytes() == before


@pytest.fixture
def copy(run: Run, tmp_path: Path) -> Run:
    shutil.copytree(run.path, tmp_path / "copy")
    return Run(tmp_path / "copy")


def test_an_edited_configuration_is_refused(copy: Run) -> None:
    data = read_json(copy.config_file)
    data["optimizer"]["lr"] = 0.5
    write_json(copy.config_file, data)
    with pytest.raises(ValueError, match=r"config.json: optimizer.lr was edited since step 4; put it back"):
        resume(copy.path)
    data["optimizer"]["lr"] = tiny().optimizer.lr
    data["training"]["steps"] = 5
    write_json(copy.config_file, data)
    assert resume(copy.path).records()[-1]["step"] == 5


def test_other_data_are_refused_and_moved_data_are_not(tmp_path: Path) -> None:
    data = images(40, 1, 8, 8)
    np.save(tmp_path / "old.npy", data.array())
    run = train(tiny(data__source=str(tmp_path / "old.npy")), tmp_path / "run")
    np.save(tmp_path / "other.npy", data.array()[::-1])
    with pytest.raises(ValueError, match=r"data.fingerprint=.* is recorded"):
        resume(run.path, {"data.source": str(tmp_path / "other.npy")})
    (tmp_path / "old.npy").rename(tmp_path / "new.npy")
    with pytest.raises(ValueError, match=r"old\.npy: the images of .*run are no longer there; .*--data"):
        resume(run.path)
    resume(run.path, {"data.source": str(tmp_path / "new.npy")})
    assert run.config().data.source == str(tmp_path / "new.npy")


class At(Callback):
    """Does something at a step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def stepped(self, trainer: Trainer) -> None:
        if trainer.step == self.step:
            self.action()


def test_an_interrupted_training_leaves_a_checkpoint_and_goes_on(run: Run, result: StageResult, tmp_path: Path) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped at step 3 with a checkpoint; go on with msdiff train --resume"
    ):
        train(tiny(), tmp_path / "run", result=result, callbacks=[At(3, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert signal.getsignal(signal.SIGINT) is handler
    assert Run(tmp_path / "run").checkpoint("latest").name == "step_00000003"
    assert final_files(resume(tmp_path / "run")) == final_files(run)


@contextmanager
def small_files(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_checkpoint_before(copy: Run) -> None:
    before = final_files(copy)
    message = r"copy: cannot be written at step 6 \(.*\); the checkpoint of step 4 is intact; .* msdiff train --resume"
    with small_files(50_000), pytest.raises(OSError, match=message):
        resume(copy.path, {"training.steps": 6})
    assert final_files(copy) == before
    assert [p.name for p in copy.checkpoints.iterdir() if p.name.startswith(".")] == []
    assert resume(copy.path).records()[-1]["step"] == 6


def test_a_full_disk_at_the_start_says_that_there_is_no_checkpoint(tmp_path: Path) -> None:
    config = noise(tmp_path, tiny(), 40, 8, 8)
    with small_files(50_000), pytest.raises(OSError, match="there is no checkpoint yet"):
        train(config, tmp_path / "run")


# -- using a run ------------------------------------------------------------------------------------------------------


def test_a_sample_depends_on_its_seed_and_number_alone(run: Run) -> None:
    many = sample(run, 7, seed=3)
    assert many.shape == (7, 1, 8, 8)
    assert many.dtype == torch.uint8
    difference = (sample(run, 5, seed=3, batch=2).int() - many[:5].int()).abs()
    assert int(difference.max()) <= 1  # another batch may round a pixel to its neighbour
    assert float((difference > 0).float().mean()) < 0.01
    assert torch.equal(sample(run, 5, seed=3, batch=5), sample(run, 5, seed=3))
    assert not torch.equal(sample(run, 7, seed=4), many)


def test_one_stage_at_a_time_samples_the_same(run: Run) -> None:
    assert torch.equal(sample(run, 3, offload=True), sample(run, 3))


@pytest.mark.parametrize(("guidance", "rows"), [(0.0, 1), (1.0, 1), (0.5, 2), (3.0, 2)])
def test_guidance_counts_two_rows_a_sample_in_memory(
    run: Run, monkeypatch: pytest.MonkeyPatch, guidance: float, rows: int
) -> None:
    asked = []
    monkeypatch.setattr(sample_module, "require_sampling_memory", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(sample_module, "images_at_once", lambda *given: asked.append(given[-1]) or 1)
    monkeypatch.setattr(sample_module, "sample_images", lambda *_, **__: torch.zeros(1, 1, 8, 8))
    sampling = dataclasses.replace(run.config().sampling, guidance=guidance)
    sample(run, 1, sampling=sampling, device="cpu")
    assert asked == [rows, rows]


def test_the_network_samples_in_the_precision_asked_for(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noted(*_: Any, autocast: torch.dtype | None, **__: Any) -> torch.Tensor:
        seen.append(autocast)
        return torch.zeros(1, 1, 8, 8)

    monkeypatch.setattr(sample_module, "sample_images", noted)
    for precision in ("auto", "fp32", "bf16", "fp16"):
        sample(run, 1, precision=precision, device="cpu")
    assert seen == [None, None, torch.bfloat16, torch.float16]
    with pytest.raises(ValueError, match="precision='fp64' is for training only"):
        sample(run, 1, precision="fp64")


def test_samples_are_handed_on_as_they_are_drawn(run: Run) -> None:
    parts: list[tuple[int, torch.Tensor]] = []
    images = sample(run, 5, batch=2, finished=lambda first, part: parts.append((first, part)))
    assert [first for first, _ in parts] == [0, 2, 4]
    assert torch.equal(torch.cat([part for _, part in parts]), images)


def test_a_sample_of_a_checkpoint_and_sampler_can_be_asked_for(run: Run) -> None:
    first, last = sample(run, 2, checkpoint="2"), sample(run, 2, checkpoint="latest")
    assert not torch.equal(first, last)
    assert torch.equal(last, sample(run, 2, checkpoint="4"))
    other = dataclasses.replace(run.config().sampling, solver="ddim", calls=3)
    seen: list[tuple[int, int]] = []
    assert torch.equal(sample(run, 2, sampling={"solver": "ddim", "calls": 3}), sample(run, 2, sampling=other))
    sample(run, 2, sampling=other, progress=lambda done, total: seen.append((done, total)))
    assert (seen[-1], len(seen)) == ((2, 2), 3)


def test_classes_are_checked(run: Run) -> None:
    with pytest.raises(ValueError, match="label=1: the run is unconditional"):
        sample(run, 2, label=1)


@pytest.mark.slow
def test_a_run_with_classes_samples_them(tmp_path: Path) -> None:
    run = train(tiny(network__num_classes=10, training__steps=2), tmp_path / "run")
    in_turn, threes = sample(run, 4, in_turn=True), sample(run, 4, label=3)
    assert torch.equal(in_turn[3], threes[3])
    frequent, labels = sample(run, 8), sample_labels(run.config(), 8)
    for label in set(labels.tolist()):
        assert torch.equal(frequent[labels == label], sample(run, 8, label=label)[labels == label])
    assert main(["sample", str(run.path), "--count", "8", "--calls", "4", "--out", str(tmp_path / "a.npz")]) == 0
    assert np.load(tmp_path / "a.npz")["labels"].tolist() == labels.tolist()
    assert main(["sample", str(run.path), "--count", "8", "--calls", "4", "--out", str(tmp_path / "folder")]) == 0
    assert open_data(tmp_path / "folder").labels.tolist() == labels.tolist()
    assert main(["sample", str(run.path), "--count", "3", "--overwrite", "--out", str(tmp_path / "folder")]) == 0
    assert len(list((tmp_path / "folder").iterdir())) == 4
    with pytest.raises(ValueError, match=r"label=10: it must be in 0\.\.9"):
        sample(run, 2, label=10)


@pytest.mark.slow
def test_sides_that_are_no_multiples_are_kept(tmp_path: Path) -> None:
    run = train(noise(tmp_path, tiny(training__steps=1), 40, 5, 9, 3), tmp_path / "run")
    assert sample(run, 2).shape == (2, 3, 5, 9)


def test_evaluations_are_added_to_the_run(copy: Run) -> None:
    first = evaluate(copy, count=40)
    second = evaluate(copy, DataConfig(source="digits"), count=20, seed=5, checkpoint="2")
    entries = read_json(copy.path / "evaluation.json")
    assert [(e["step"], e["sampling_seed"], e["samples"], e["data"]) for e in entries] == [
        (int(copy.checkpoint().name[-4:]), 0, 40, "digits"),
        (2, 5, 20, "digits"),
    ]
    assert [read_result(entry) for entry in entries] == [first, second]
    third = evaluate(copy, count=20, seed=5, checkpoint="4")
    assert third.metrics["frechet"].value != second.metrics["frechet"].value
    assert (first.count, first.reference_count, first.training_count) == (40, 180, 1617)
    assert json.loads(json.dumps(to_dict(first), allow_nan=False)) == to_dict(first)


def test_what_cannot_be_compared_is_refused_before_sampling(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr("multistage_diffusion.workflow.evaluate.sample", refuse)
    np.save(tmp_path / "few.npy", images(20, 1, 8, 8).array())
    np.save(tmp_path / "colour.npy", images(20, 3, 8, 8).array())
    np.save(tmp_path / "wide.npy", images(20, 1, 8, 16).array())
    few = DataConfig(source=str(tmp_path / "few.npy"), held_out=0.1)
    with pytest.raises(
        ValueError, match=r"\d held-out images: metric 'precision-recall' needs at least 4 images; give"
    ):
        evaluate(run, few, metrics=("precision-recall",))
    for source, held_out, message in (
        ("colour.npy", 0.3, "data: images of 3 x 8 x 8"),
        ("wide.npy", 0.3, r"data: images of 1 x 8 x 16 .*, but those of .* are 1 x 8 x 8; give --size H W"),
        ("digits", 0.3, "data.held_out=0.3: .* was trained on these data with 0.1"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(run, DataConfig(source=str(tmp_path / source) if "." in source else source, held_out=held_out))
    with pytest.raises(ValueError, match="features='incepton' is unknown"):
        evaluate(run, features="incepton")
    assert not (run.path / "evaluation.json").exists()


def test_the_report_is_one_file(run: Run) -> None:
    page = report(run, count=4)
    assert page == run.path / "report.html"
    text = page.read_text()
    assert "where the noise was cut, and what was measured over it" in text
    assert "4 samples, not selected" in text
    assert "shared encoder" in text


def test_a_run_is_read_as_it_was_written(run: Run) -> None:
    assert from_dict(RunConfig, read_json(run.config_file)) == run.config()


def test_stages_and_scale_of_other_data_are_warned_of(tmp_path: Path) -> None:
    config = override(noise(tmp_path, tiny(training__steps=1), 40, 8, 8), {"diffusion.sigma_data": 2.0})
    with pytest.warns(UserWarning, match="those of digits") as warned:
        train(config, tmp_path / "run")
    said = [str(w.message) for w in warned]
    assert any("the stages are those of digits; msdiff stages finds" in message for message in said)
    assert any("diffusion.sigma_data=2, but the images' standard deviation is 0.5" in message for message in said)


def test_a_run_is_not_made_shorter_than_it_is(copy: Run) -> None:
    before = final_files(copy)
    with pytest.raises(ValueError, match=r"training\.steps=3 is below step 4, which .* has reached"):
        resume(copy.path, {"training.steps": 3})
    assert final_files(copy) == before


def test_folders_may_be_given_as_strings(copy: Run) -> None:
    assert torch.equal(sample(str(copy.path), 2), sample(copy, 2))
    assert Run.open(str(copy.path)).config() == copy.config()


def test_what_auto_precision_chose_is_stored_when_a_run_starts(tmp_path: Path) -> None:
    # a run of its own: the shared one may have been resumed, which stores it once more
    config = tiny(training__steps=1)
    assert config.training.precision == "auto"
    assert train(config, tmp_path / "run", device="cpu").config().training.precision == "fp32"


# -- counts and arguments that cannot be -------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "words"), [(-3, "count=-3 must be positive"), (10**7, "count=10000000 needs")])
def test_counts_are_checked_before_labels_are_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, words: str
) -> None:
    monkeypatch.setattr("multistage_diffusion.memory.available_memory", lambda: 1 << 30)
    for name in ("labels_in_turn", "frequent_labels"):
        monkeypatch.setattr(sample_module, name, lambda *_: pytest.fail("labels were made"))
    classes = {"network__num_classes": 3, "data__shape": (1, 8, 8), "data__class_counts": (5, 5, 5)}
    run = Run.create(tmp_path / "run", tiny(**classes))
    for in_turn in (False, True):
        with pytest.raises(UserError, match=words):
            sample(run, count, in_turn=in_turn)
    out = tmp_path / "out.npz"
    assert main(["sample", str(run.path), "--count", str(count), "--out", str(out)]) == 2


def test_a_configuration_is_asked_for(tmp_path: Path) -> None:
    for wrong in ("digits", {"a": 1}, tmp_path):
        with pytest.raises(UserError, match=r"must be a RunConfig: preset\(NAME\)"):
            train(wrong, tmp_path / "run")  # type: ignore[arg-type]
        with pytest.raises(UserError, match=r"must be a RunConfig: preset\(NAME\)"):
            describe(wrong)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_folder_that_lost_its_configuration_is_not_taken_for_no_run(tmp_path: Path) -> None:
    run = train(noise(tmp_path, tiny(training__steps=1), 40, 8, 8), tmp_path / "run")
    run.config_file.unlink()
    with pytest.raises(UserError, match=r"has checkpoints, but no config\.json; put this file back"):
        Run.open(run.path)
    with pytest.raises(UserError, match=r"not a run \(no config\.json\); name the folder"):
        Run.open(tmp_path)
