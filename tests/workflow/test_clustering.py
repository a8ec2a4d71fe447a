from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from multistage_diffusion import rng
from multistage_diffusion.data import to_float
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.stage_finding import StageResult, StageSettings
from multistage_diffusion.training.checkpoint import Checkpoint, save_checkpoint
from multistage_diffusion.training.gradients import gradient_affinity
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.clustering import find_stages_by_gradients, gradient_stages

BINS = 10
BORDERS = tuple(round(0.001 + 0.999 * k / BINS, 9) for k in range(BINS + 1))
QUICK: dict[str, Any] = {"bins": BINS, "rows": 8, "device": "cpu"}


@pytest.fixture
def make_run(tmp_path: Path, tiny_config: Any, tiny_data: Any) -> Any:
    """Make runs on labelled random images, with random weights."""
    data = tiny_data(40, classes=3)
    np.savez(tmp_path / "images.npz", images=data.array(), labels=data.labels)

    def make(**changes: Any) -> Run:
        config = tiny_config(data__source=str(tmp_path / "images.npz"), **changes)
        run = Run.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", config)
        torch.manual_seed(0)
        denoiser = build_denoiser(config)
        for p in denoiser.parameters():
            nn.init.normal_(p, std=0.1)
        weights = denoiser.state_dict()
        save_checkpoint(run.checkpoints, Checkpoint(weights, weights, {}, {"step": 5, "config": config}))
        return run

    return make


@pytest.mark.parametrize("cuts", [(2, 6), (3, 8)])
def test_a_run_of_several_stages_shows_its_own_edges(make_run: Any, cuts: tuple[int, int]) -> None:
    # decoders of random weights have nothing in common, so that the encoder's gradients change with the decoder
    sigmas = [VP().edge_sigma(BORDERS[k]) for k in cuts]
    run = make_run(stages__interior=sigmas, network__decoder_widths=[8, 8, 8])
    edges, curves = gradient_stages(run, 3, **QUICK)
    assert edges == tuple(BORDERS[k] for k in cuts)
    similarity = np.array(curves["similarity"])
    groups = list(itertools.pairwise((0, *cuts, BINS)))
    assert curves["objective_value"] == pytest.approx(
        sum((1 - similarity[a:b, a:b]).sum() for a, b in groups), abs=1e-4
    )


def test_the_cut_is_the_best_of_all(make_run: Any) -> None:
    run = make_run(network__decoder_widths=[8], stages__interior=[])
    for objective, best in (("total-distance", min), ("mean-similarity", max)):
        edges, curves = gradient_stages(run, 3, objective=objective, **QUICK)
        assert curves["t"] == list(BORDERS[:-1])
        assert curves["steps"] == [5]
        similarity = np.array(curves["similarity"])
        values = {}
        for cuts in itertools.combinations(range(1, BINS), 2):
            groups = [similarity[a:b, a:b] for a, b in itertools.pairwise((0, *cuts, BINS))]
            values[cuts] = sum((1 - g).sum() if best is min else g.mean() for g in groups)
        found = values[tuple(BORDERS.index(edge) for edge in edges)]
        assert found == pytest.approx(best(values.values()), abs=1e-4)  # similarities are written with six digits
        assert curves["objective_value"] == pytest.approx(found, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("held_out", "classes"), [(0.3, 3), (0.0, 0)])
def test_held_out_images_are_taken_with_their_labels(make_run: Any, held_out: float, classes: int) -> None:
    run = make_run(data__held_out=held_out, network__num_classes=classes)
    _, curves = gradient_stages(run, 2, seed=7, **QUICK)
    training, others = run.data().split(held_out)
    data = others if held_out else training
    assert (len(data) < 20) == bool(held_out)
    order = torch.randperm(len(data), generator=rng.generator((7, "gradient-images")))[:8]
    y, labels = to_float(data.array()[order.numpy()]), torch.from_numpy(data.labels)[order]
    expected = gradient_affinity(run, y, labels if classes else None, measure=VP(), bins=BINS, seed=7)
    assert curves["similarity"] == np.round(expected.matrix.numpy(), 6).tolist()
    assert gradient_stages(run.path, 2, seed=7, **QUICK)[1] == curves
    assert gradient_stages(run, 2, seed=8, **QUICK)[1] != curves


@pytest.mark.slow
def test_latents_are_compared_as_the_network_sees_them(make_run: Any) -> None:
    plain = make_run(data__held_out=0.0)
    run = make_run(data__held_out=0.0, codec__source="identity", codec__scale=0.25, codec__shape=[1, 4, 4])
    order = torch.randperm(40, generator=rng.generator((0, "gradient-images")))[:8]
    latents = 0.25 * to_float(run.data().array()[order.numpy()])
    expected = gradient_affinity(run, latents, measure=VP(), bins=BINS).matrix.numpy()
    assert gradient_stages(run, 2, **QUICK)[1]["similarity"] == np.round(expected, 6).tolist()
    assert gradient_stages(plain, 2, **QUICK)[1] != gradient_stages(run, 2, **QUICK)[1]


def test_few_images_are_taken_again(make_run: Any) -> None:
    run = make_run(data__held_out=0.1)
    _, held_out = run.data().split(0.1)
    assert len(held_out) < 8
    edges, curves = gradient_stages(run, 2, **QUICK)
    assert len(edges) == 1
    assert np.isfinite(curves["similarity"]).all()


@pytest.mark.slow
def test_times_are_those_of_the_kernel_asked_for(make_run: Any) -> None:
    own = VP(beta_d=12.0, beta_min=0.3)
    run = make_run(diffusion__schedule=own)
    assert gradient_stages(run, 3, **QUICK) == gradient_stages(run, 3, measure=own, **QUICK)
    _, curves = gradient_stages(run, 3, measure=VP(), **QUICK)
    # the run's noise ends before the standard kernel's does
    last = float(VP().time(own.sigma(1.0)))
    first = float(VP().time(own.sigma(0.001)))
    assert curves["t"] == pytest.approx(np.linspace(first, last, BINS + 1)[:-1], abs=1e-8)
    # another kind of schedule has the standard kernel's time
    assert gradient_stages(make_run(), 3, **QUICK)[1]["t"] == list(BORDERS[:-1])


def test_progress_is_told(make_run: Any) -> None:
    told: list[tuple[int, int]] = []
    gradient_stages(make_run(), 2, progress=lambda done, total: told.append((done, total)), **QUICK)
    assert told == [(i, BINS) for i in range(1, BINS + 1)]


def test_what_cannot_be_cut_is_refused(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    for name in ("rows", "batch"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            gradient_stages(run, 2, **{**QUICK, name: 0})
    for stages in (0, BINS + 1):
        with pytest.raises(ValueError, match=f"stages={stages} must be between 1 and the {BINS} bins"):
            gradient_stages(run, stages, **QUICK)
    with pytest.raises(ValueError, match="not a run"):
        gradient_stages(tmp_path / "none", 2, **QUICK)


@pytest.mark.slow
def test_a_run_is_split_as_images_are(make_run: Any, tmp_path: Path) -> None:
    run = make_run()
    settings = StageSettings(algorithm="gradient", stages=3, seed=2)
    result = find_stages_by_gradients(run, settings, out=tmp_path / "stages.json", device="cpu")
    edges, curves = gradient_stages(run, 3, seed=2, device="cpu")
    table = result.curves["table"]
    assert result.edges_t == edges
    assert {**result.curves, "table": None} == {**curves, "table": None}
    assert table[2]["edges_t"] == list(edges)
    assert [line["stages"] for line in table] == list(range(1, 9))
    assert result.data_range == (-1.0, 1.0)
    assert StageResult.load(tmp_path / "stages.json") == result
    assert (tmp_path / "stages.png").exists()


@pytest.mark.slow
def test_a_split_of_a_latent_run_is_for_its_codec(make_run: Any) -> None:
    run = make_run(codec__source="identity", codec__scale=0.25, codec__shape=[1, 4, 4], codec__fingerprint="")
    result = find_stages_by_gradients(run, StageSettings(algorithm="gradient", stages=2), device="cpu")
    assert (result.data_range, result.scale) == (None, 0.25)
