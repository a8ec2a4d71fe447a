import dataclasses
import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.files import write_json
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.stage_finding import StageResult, StageSettings, compute_stages
from multistage_diffusion.stages import Stages

IMAGES = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:300, None]
FEW = StageSettings(samples=100, times=8)
VP_DICT = {"kind": "vp", "beta_d": 19.9, "beta_min": 0.1, "t_min": 1e-3, "t_max": 1.0}
OPTIONAL = ("scale", "diffusion")  # null for pixels, and for the optimal denoiser


@pytest.fixture(scope="module")
def result() -> StageResult:
    return compute_stages(IMAGES, FEW, fingerprint="abc")


@pytest.fixture(scope="module")
def clustered() -> StageResult:
    settings = StageSettings(algorithm=2, stages=4, samples=100, data_range=(0.0, 1.0))
    return compute_stages(IMAGES[:200], settings, held_out=IMAGES[200:])


@pytest.fixture(scope="module")
def latent() -> StageResult:
    images = 3.0 * np.random.default_rng(0).standard_normal((100, 4, 4, 4)).astype(np.float32)
    return compute_stages(images, dataclasses.replace(FEW, data_range=None), schedule=EDM(), codec="def", scale=0.5)


@pytest.fixture(scope="module")
def even() -> StageResult:
    return compute_stages(IMAGES, StageSettings(algorithm="snr", stages=4))


def test_stages_carry_their_origin(result, latent):
    assert result.stages() == Stages(
        result.edges_sigma,
        {
            "data_range": [-1.0, 1.0],
            "time_measure": VP_DICT,
            "rule": "interval-mean",
            "kernel": VP_DICT,
            "fingerprint": "abc",
        },
    )
    origin = latent.stages().origin
    assert (origin["data_range"], origin["kernel"]["kind"], origin["time_measure"]) == (None, "edm", VP_DICT)


def test_what_settings_hold_is_at_hand(result, clustered, latent, even):
    assert [r.data_range for r in (result, clustered, latent)] == [(-1.0, 1.0), (0.0, 1.0), None]
    assert [r.rule for r in (result, clustered, even)] == ["interval-mean", "total-distance", "snr"]
    assert [r.codec for r in (result, latent)] == ["", "def"]
    assert [r.scale for r in (result, latent)] == [None, 0.5]


def test_boundary_ratios_are_the_edges_in_the_time_of_rectified_flow(result):
    changed = dataclasses.replace(result, edges_sigma=(0.25, 7.0))
    assert changed.boundary_ratios == pytest.approx((0.2, 0.875))  # x = (1 - t) y + t n: sigma = t / (1 - t)


def test_save_and_load(result, clustered, latent, even, tmp_path):
    path = tmp_path / "stages.json"
    for value in (result, clustered, latent, even):
        value.save(path)
        assert StageResult.load(path) == value
        data = read_json(path)
        assert set(data) == {field.name for field in dataclasses.fields(StageResult)} | {"data_range", "rule"}
        assert data["data_range"] == (None if value is latent else list(value.data_range))
        assert data["format_version"] == 3
    assert [p.name for p in tmp_path.iterdir()] == ["stages.json"]


def test_curves_of_both_algorithms_are_plain_lists(result, clustered):
    assert set(result.curves) == {"t", "s0", "s1", "s0_error", "s1_error"}
    assert {len(values) for values in result.curves.values()} == {100}
    assert set(clustered.curves) == {"t", "similarity", "objective_value", "table"}
    assert np.shape(clustered.curves["similarity"]) == (41, 41)
    assert json.loads(json.dumps(clustered.curves)) == clustered.curves


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 1}, "format_version=1: this release reads format 3; find the stages again"),
        ({"edges_t": None}, "edges_t missing"),
        ({"intervals_t": None, "rule": None}, "intervals_t, rule missing"),
        ({"extra": 1}, "extra: unknown key"),
        ({"edges_sigma": [5.0, 1.0]}, "ascending"),
        ({"edges_sigma": [5.0]}, "edges_sigma=.* must hold 2 edges"),
        ({"edges_t": [0.1, 0.2, 0.3]}, "edges_t=.* must hold 2 edges"),
        ({"intervals_t": [[0.1, 0.2]]}, "intervals_t=.* must hold 2 edges"),
        ({"intervals_sigma": [[0.1, 0.2], [0.3]]}, r"intervals_sigma\[1\]=.* must have 2 values"),
        ({"samples": 1.5}, "samples=1.5"),
        ({"data_range": [0.0, 1.0]}, "data_range=.* contradicts the settings"),
        ({"rule": "pointwise"}, "rule='pointwise' contradicts the settings"),
        ({"curves": {"t": [0.1]}}, "curves must hold t, s0, s1"),
        ({"curves": {"t": [0.1], "s0": [1.0], "s1": [1.0, 2.0], "s0_error": [0], "s1_error": [0]}}, "differ in length"),
        ({"curves": {"t": [0.1], "s0": ["x"], "s1": [1.0], "s0_error": [0], "s1_error": [0]}}, "lists of numbers"),
        ({"curves": {"t": [0.1], "s0": ["1"], "s1": [1.0], "s0_error": [0], "s1_error": [0]}}, "lists of numbers"),
        ({"curves": {"t": [0.1], "s0": [10**400], "s1": [1.0], "s0_error": [0], "s1_error": [0]}}, "lists of numbers"),
        ({"curves": {"t": [0.1], "s0": [[1], 2], "s1": [1.0], "s0_error": [0], "s1_error": [0]}}, "different lengths"),
        ({"curves": [1]}, "curves=.* must be a mapping"),
        ({"strip": "x"}, "strip: is not in base64"),
        ({"strip": "aGVsbG8="}, "strip: "),
        ({"edges_sigma": [0.1, 10**400]}, "must be a finite number"),
    ],
)
def test_broken_files_are_refused_by_name(result, tmp_path, change, message):
    path = tmp_path / "stages.json"
    data = {key: value for key, value in {**result.to_dict(), **change}.items() if value is not None or key in OPTIONAL}
    write_json(path, data)
    with pytest.raises(ValueError, match=message) as error:
        StageResult.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"similarity": [[1.0, 0.5]]}, "differ in length"),
        ({"similarity": 1.0}, "differ in length"),
        ({"objective_value": [1.0]}, "differ in length"),
        ({"table": [{"stages": 1}]}, "table"),
        ({"table": None}, "table"),
    ],
)
def test_broken_matrices_are_refused(clustered, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(clustered, curves={**clustered.curves, **change})


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "stages.json"
    with pytest.raises(ValueError, match="no such file"):
        StageResult.load(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="not a result of msdiff stages"):
        StageResult.load(path)
