"""Runs compared on the same images and noise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override, read_json, to_dict
from multistage_diffusion.data import to_float
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation.denoising_errors import denoising_errors
from multistage_diffusion.files import write_json
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.reporting.comparison_page import write_comparison
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.compare_runs import compare_runs
from multistage_diffusion.workflow.evaluate import compare
from multistage_diffusion.workflow.likelihood import noise_range
from multistage_diffusion.workflow.train import train


def config(data: Path, **changes: Any) -> RunConfig:
    return override(
        preset("digits"),
        {
            "data.source": str(data),
            "data.shape": [],
            "network.encoder_width": 8,
            "network.decoder_widths": [8, 8, 8],
            "training.shares": "uniform",
            "training.batch": 6,
            "training.steps": 2,
            "training.held_out_rows": 4,
            "training.held_out_every": 0,
            "sampling.calls": 3,
            "evaluation.every": 1,
            "evaluation.count": 12,
            **changes,
        },
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs on the same noise images, `one` and `other`, and one on others, `foreign`."""
    folder = tmp_path_factory.mktemp("compared")
    for name, seed in (("mine", 0), ("foreign", 1)):
        pixels = np.random.default_rng(seed).integers(0, 256, (60, 8, 8), dtype=np.uint8)
        np.save(folder / f"{name}.npy", pixels)
    train(config(folder / "mine.npy"), folder / "one")
    train(config(folder / "mine.npy", **{"training.seed": 1}), folder / "other")
    train(config(folder / "foreign.npy"), folder / "foreign")
    train(config(folder / "mine.npy", **{"data.held_out": 0.3}), folder / "other-share")
    train(config(folder / "mine.npy", **{"diffusion.prior.p_mean": 1.0}), folder / "other-noise")
    return folder


def test_errors_are_those_of_the_held_out_images(folder: Path) -> None:
    found = compare_runs([folder / "one", folder / "other"], levels=4, checkpoint="latest")
    run = Run.open(folder / "other")
    _, held_out = run.data().split(run.config().data.held_out)
    data, sigmas = to_float(held_out.tensor()), torch.tensor(found.sigmas, dtype=torch.float64)
    own = denoising_errors(run.denoiser("latest"), data, sigmas)
    base = denoising_errors(Run.open(folder / "one").denoiser("latest"), data, sigmas)
    assert found.rows == len(held_out)
    assert found.runs[1].errors == pytest.approx(own.mean(1).tolist())
    expected = ((own - base).mean(1) / base.mean(1)).tolist()
    assert [d.mean for d in found.runs[1].differences] == pytest.approx(expected)
    assert found.runs[0].differences == ()
    assert found.runs[0].bound is None
    assert [run.name for run in found.runs] == ["one", "other"]


def test_an_excess_is_above_the_optimal_denoiser_of_the_training_images(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    found = compare_runs(
        [folder / "one"], levels=5, count=20, excess=True, progress=lambda done, total: told.append((done, total))
    )
    assert told == sorted(told)  # the optimal denoiser's part comes first
    assert told[-1] == (200, 200)
    run = Run.open(folder / "one")
    training, _ = run.data().split(run.config().data.held_out)
    data, sigmas = to_float(training.tensor()), torch.tensor(found.sigmas, dtype=torch.float64)
    least = denoising_errors(OptimalDenoiser(data), data[:20], sigmas)
    own = denoising_errors(run.denoiser("best"), data[:20], sigmas)
    assert [run.name for run in found.runs] == ["optimal denoiser", "one"]
    assert found.runs[0].errors == pytest.approx(least.mean(1).tolist())
    expected = (1 - least.mean(1) / own.mean(1)).tolist()
    assert [d.mean for d in found.runs[1].differences] == pytest.approx(expected)
    assert found.runs[1].bound is not None
    assert found.runs[1].bound.mean > 0
    page, _ = write_comparison(found, tmp_path / "excess.html", pixels=True)
    text = page.read_text()
    assert "above the least possible" in text
    assert "training images" in text
    assert "held-out" not in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network.num_classes": 2}, r"network\.num_classes: the least error"),
        ({"training.flip": True}, r"training\.flip: the runs have other training images"),
    ],
)
def test_an_excess_that_is_not_known_is_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    other = Path(shutil.copytree(folder / "one", tmp_path / "other"))
    write_json(other / "config.json", to_dict(override(Run.open(other).config(), changes)))
    with pytest.raises(UserError, match=message):
        compare_runs([folder / "one", other], levels=2, count=2, excess=True)
    with pytest.raises(UserError, match="0 runs to compare: name one or more"):
        compare_runs([], excess=True)


def test_a_run_does_not_differ_from_its_copy(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "one", tmp_path / "one")
    found = compare_runs([folder / "one", tmp_path / "one"], levels=3)
    assert all((d.mean, d.error) == (0, 0) for d in found.runs[1].differences)
    assert found.runs[1].bound is not None
    assert found.runs[1].bound.mean == 0
    assert [run.name for run in found.runs] == [str(folder / "one"), str(tmp_path / "one")]  # one name is not enough


def test_curves_are_those_of_training_and_of_evaluations_by_cost(folder: Path, tmp_path: Path) -> None:
    copy = Run(Path(shutil.copytree(folder / "one", tmp_path / "copy")))
    for calls, checkpoint in ((5, "latest"), (3, "latest"), (4, "1")):  # the last one is not of the checkpoint compared
        sampling = override(copy.config().sampling, {"calls": calls})
        compare(copy, count=12, sampling=sampling, checkpoint=checkpoint)
    entries = read_json(copy.path / "evaluation.json")
    averaged = [{**entries[0], "ema": 0.1, "sampling": {**entries[0]["sampling"], "calls": 7}}]  # of other weights
    write_json(copy.path / "evaluation.json", entries + averaged)
    found = compare_runs([copy, folder / "other"], levels=2, checkpoint="latest").runs
    records = [r for r in copy.records() if r["kind"] == "quality"]
    assert found[0].training == tuple((r["petaflops"], r["frechet"]) for r in records)
    assert len(found[0].training) == 2
    assert len(found[0].sampling) == 2
    cost, distances = zip(*found[0].sampling, strict=True)
    assert cost[0] < cost[1] == pytest.approx(cost[0] * 5 / 3, rel=1e-6)  # decoders of one width
    assert min(distances) > 0
    assert found[1].sampling == ()


def test_only_evaluations_of_equal_counts_are_drawn_together(folder: Path, tmp_path: Path) -> None:
    copies = [Run(Path(shutil.copytree(folder / name, tmp_path / name))) for name in ("one", "other")]
    for copy in copies:
        compare(copy, count=12, checkpoint="latest")
    (few,) = read_json(copies[0].path / "evaluation.json")
    more = {**few, "count": few["count"] + 5, "metrics": {"frechet": {**few["metrics"]["frechet"], "value": 1e6}}}
    write_json(copies[0].path / "evaluation.json", [few, more])
    found = compare_runs(copies, levels=2, checkpoint="latest").runs
    assert [len(run.sampling) for run in found] == [1, 1]
    assert found[0].sampling[0][1] == few["metrics"]["frechet"]["value"]  # that of as many images as the other's


def test_levels_are_of_the_noise_that_all_runs_are_trained_on(folder: Path) -> None:
    found = compare_runs([folder / "one", folder / "other-noise"], levels=5, count=2)
    ranges = [noise_range(Run.open(folder / name).config()) for name in ("one", "other-noise")]
    assert ranges[0][0] < ranges[1][0] < ranges[0][1] < ranges[1][1]
    assert (found.sigmas[0], found.sigmas[-1]) == pytest.approx((ranges[1][0], ranges[0][1]))
    steps = np.diff(np.log(found.sigmas))
    assert steps == pytest.approx(steps[0])


def test_the_page_shows_what_there_is(folder: Path, tmp_path: Path) -> None:
    found = compare_runs([folder / "one", folder / "other"], levels=3, checkpoint="latest")
    page, picture = write_comparison(found, tmp_path / "page.html", pixels=True)
    text = page.read_text()
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "bits/dim" in text
    assert "Quality by training" in text
    assert "Quality by sampling" not in text  # neither was evaluated
    for sigma in found.sigmas:
        assert f"{sigma:.4g}" in text
    assert f"{100 * found.runs[1].differences[0].mean:+.2f} ± " in text


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (["one"], {}, "1 run to compare: name two or more"),
        (
            ["one", "foreign"],
            {},
            r"foreign: was trained on .*foreign.npy \(8x8\), .*one on .*mine.npy \(8x8\); compare runs on the same images",
        ),
        (
            ["one", "other-share"],
            {},
            "other-share: data.held_out=0.3 differs from 0.1 .* the same held-out images",
        ),
        (["one", "other"], {"count": 1}, "count=1 and levels=24 must be at least 2"),
        (["one", "other"], {"levels": 1}, "levels=1 must be at least 2"),
        (["one", "none"], {}, "none"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    folder: Path, names: list[str], changes: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compare_runs([folder / name for name in names], **changes)  # type: ignore[arg-type]
