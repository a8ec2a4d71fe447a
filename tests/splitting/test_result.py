import itertools
import json

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from multistage_diffusion.schedules import EDM, VE, VP, Discrete
from multistage_diffusion.serialization import read_json, write_json
from multistage_diffusion.splitting import SplitResult, SplitSettings, find_stages

DIGITS = load_digits().images / 16
DIGITS_UINT8 = np.round(DIGITS * 255).astype(np.uint8)[:, None]
FEW = SplitSettings(samples=2000)


@pytest.fixture(scope="module")
def result() -> SplitResult:
    return find_stages(DIGITS_UINT8, FEW, fingerprint="abc")


@pytest.fixture(scope="module")
def clustered() -> SplitResult:
    return find_stages(DIGITS_UINT8, SplitSettings(algorithm=2, stages=4, samples=200, data_range=(0.0, 1.0)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("data_range", "expected"), [((0.0, 1.0), (0.0945, 0.441)), ((-1.0, 1.0), (0.188, 0.577))])
def test_algorithm_1_on_digits(data_range, expected, seed):
    low, high = data_range
    images = low + (high - low) * torch.tensor(DIGITS, dtype=torch.float32)[:, None]
    found = find_stages(images, SplitSettings(samples=20_000, data_range=data_range, seed=seed))
    assert found.edges_t == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("data_range", "expected"), [((0.0, 1.0), (0.0945, 0.441)), ((-1.0, 1.0), (0.188, 0.577))])
def test_uint8_images_are_mapped_onto_the_range(data_range, expected):
    found = find_stages(DIGITS_UINT8, SplitSettings(samples=20_000, data_range=data_range))
    assert found.edges_t == pytest.approx(expected, abs=0.01)


def test_eps_space_is_blind_to_a_common_scale():
    one = find_stages(DIGITS_UINT8, SplitSettings(samples=20_000, data_range=(0.0, 1.0)))
    two = find_stages(DIGITS_UINT8, SplitSettings(samples=20_000))
    for half, whole in zip(one.edges_sigma, two.edges_sigma, strict=True):
        assert whole / half == pytest.approx(2, rel=0.12)


@pytest.mark.parametrize("schedule", [VE(), EDM(), Discrete()])
def test_edges_are_printed_in_the_kernel_asked_for(result, schedule):
    found = find_stages(DIGITS_UINT8, FEW, schedule=schedule)
    assert found.time_measure == VP()
    assert found.curves == result.curves
    tolerance = 0.02 if schedule.kind == "discrete" else 1e-9  # a discrete edge is a whole step
    assert found.edges_sigma == pytest.approx(result.edges_sigma, rel=tolerance)
    assert found.edges_t == tuple(schedule.edge_time(s) for s in result.edges_sigma)


def test_stages_carry_their_origin(result):
    stages = result.stages()
    assert stages.interior == result.edges_sigma
    assert result.edges_sigma == pytest.approx([float(VP().sigma(t)) for t in result.edges_t])
    assert stages.origin == {
        "data_range": [-1.0, 1.0],
        "time_measure": {"kind": "vp", "beta_d": 19.9, "beta_min": 0.1, "t_min": 1e-3, "t_max": 1.0},
        "rule": "interval-mean",
        "kernel": {"kind": "vp", "beta_d": 19.9, "beta_min": 0.1, "t_min": 1e-3, "t_max": 1.0},
        "fingerprint": "abc",
    }


def test_algorithm_2_records_its_grid_and_settings(clustered):
    t = clustered.curves["t"]
    assert t == pytest.approx([*(0.001 + 0.025 * np.arange(40)), 1.0], abs=1e-12)
    assert np.shape(clustered.curves["similarity"]) == (41, 41)
    assert set(clustered.edges_t) <= set(t)
    assert (clustered.rule, clustered.settings.space) == ("total-distance", "x0")
    similarity = np.array(clustered.curves["similarity"])
    cuts = [0, *(t.index(e) for e in clustered.edges_t), 41]
    total = sum((1 - similarity[a:b, a:b]).sum() for a, b in itertools.pairwise(cuts))
    assert clustered.curves["objective_value"] == pytest.approx(total, abs=1e-3)
    one = find_stages(DIGITS_UINT8, SplitSettings(algorithm=2, stages=1, samples=100))
    assert (one.edges_t, len(one.stages())) == ((), 1)


def test_defaults_depend_on_the_algorithm_only_when_unset():
    assert (SplitSettings().resolved().samples, SplitSettings().resolved().space) == (50_000, "eps")
    second = SplitSettings(algorithm=2, space="eps").resolved()
    assert (second.samples, second.space) == (2_000, "eps")


def test_curves_are_binned_means(result):
    t, s0 = np.array(result.curves["t"]), np.array(result.curves["s0"])
    assert len(t) == 200
    assert t[[0, -1]] == pytest.approx([0.001 + 0.999 * 0.0025, 1 - 0.999 * 0.0025], abs=1e-6)
    assert s0[:5].min() > 0.95
    assert s0[80:110].max() < 0.5


def test_save_and_load(result, clustered, tmp_path):
    for value in (result, clustered):
        value.save(tmp_path / "split.json")
        assert SplitResult.load(tmp_path / "split.json") == value
    data = read_json(tmp_path / "split.json")
    expected = {"edges_t", "edges_sigma", "schedule", "data_range", "settings", "time_measure", "rule", "fingerprint"}
    assert {*expected, "curves", "format_version"} == set(data)
    assert (data["rule"], data["data_range"]) == ("total-distance", [0.0, 1.0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format_version=2"),
        ({"edges_t": None}, "edges_t missing"),
        ({"extra": 1}, "extra: unknown key"),
        ({"edges_sigma": [5.0, 1.0]}, "ascending"),
        ({"edges_sigma": [5.0]}, "must hold 2 edges"),
        ({"data_range": [0.0, 1.0]}, "contradicts the settings"),
        ({"curves": {"t": [0.1]}}, "curves must hold t, s0, s1"),
        ({"curves": {"t": [0.1], "s0": [1.0], "s1": [1.0, 2.0]}}, "differ in length"),
        ({"curves": {"t": [0.1], "s0": ["x"], "s1": [1.0]}}, "lists of numbers"),
    ],
)
def test_broken_files_are_refused_by_name(result, tmp_path, change, message):
    path = tmp_path / "split.json"
    data = {key: value for key, value in {**result.to_dict(), **change}.items() if value is not None}
    write_json(path, data)
    with pytest.raises(ValueError, match=message) as error:
        SplitResult.load(path)
    assert str(path) in str(error.value)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "split.json"
    with pytest.raises(ValueError, match="no such file"):
        SplitResult.load(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="not the result of a split"):
        SplitResult.load(path)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.full((5, 1, 4, 4), 7, np.uint8), "all 5 images are the same"),
        (DIGITS_UINT8[:1], "all 1 images are the same"),
        (np.zeros((0, 1, 4, 4), np.uint8), "not empty"),
        (DIGITS_UINT8.astype(np.int64), "must be uint8 or floating point"),
        (torch.tensor([[0.0, float("nan")], [0.0, 0.5]]), "NaN"),
        (DIGITS * 16, r"from 0 to 16, outside data_range=\(-1, 1\)"),
        (DIGITS - 1.5, r"from -1.5 to -0.5, outside data_range=\(-1, 1\)"),
    ],
)
@pytest.mark.parametrize("settings", [FEW, SplitSettings(algorithm=2, samples=100)])
def test_unusable_images_are_refused(images, message, settings):
    with pytest.raises(ValueError, match=message):
        find_stages(images, settings)


def test_unreachable_alpha_prints_the_range_of_the_curve():
    near = np.random.default_rng(0).integers(127, 129, (50, 1, 4, 4)).astype(np.uint8)  # told apart at no noise level
    with pytest.raises(ValueError, match=r"falls short of alpha=1.0 .*it runs from 0\.\d+ to 0\.\d+.*lower alpha"):
        find_stages(near, SplitSettings(samples=500, alpha=1.0, space="eps", eta=1e-4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": 3}, "algorithm=3"),
        ({"stages": 4}, "stages=4: algorithm 1 finds three stages"),
        ({"algorithm": 2, "stages": 0}, "stages=0"),
        ({"samples": 5}, "samples=5"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"rule": "mean"}, "rule='mean'"),
        ({"space": "x1"}, "space='x1'"),
        ({"objective": "best"}, "objective='best'"),
        ({"data_range": (1.0, -1.0)}, "data_range"),
        ({"grid": 1}, "grid=1"),
    ],
)
def test_settings_are_validated(changes, message):
    with pytest.raises(ValueError, match=message):
        SplitSettings(**changes)


def test_too_many_stages_for_the_grid():
    with pytest.raises(ValueError, match="stages=42 is more than the 41 times"):
        find_stages(DIGITS_UINT8, SplitSettings(algorithm=2, stages=42, samples=100))
