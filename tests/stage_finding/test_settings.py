import dataclasses

import pytest

from multistage_diffusion.config.serialization import from_dict, to_dict
from multistage_diffusion.stage_finding import StageSettings
from multistage_diffusion.stage_finding.settings import MOST_SAMPLES, require_setting


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": 3}, "algorithm=3"),
        ({"stages": 4}, "stages=4: algorithm 1 finds three stages"),
        ({"algorithm": 2, "stages": 0}, "stages=0"),
        ({"samples": 99}, "samples=99 must be at least 100"),
        ({"times": 0}, "times=0"),
        ({"algorithm": 2, "nodes": 2}, "nodes=2 must be at least 3"),
        ({"nodes": 21}, "nodes=21: only algorithm 2 with denoiser optimal has such a grid"),
        ({"algorithm": 2, "denoiser": "gaussian", "nodes": 21}, "nodes=21: only algorithm 2"),
        ({"precision": 0.0}, "precision=0.0"),
        ({"precision": 1.0}, "precision=1.0"),
        ({"precision": float("nan")}, "precision=nan"),
        ({"eta": 0.0}, "eta=0.0"),
        ({"eta": float("inf")}, "eta=inf"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"alpha": 1.5}, "alpha=1.5"),
        ({"alpha": 0.0}, "alpha=0.0"),
        ({"rule": "mean"}, "rule='mean'"),
        ({"space": "x1"}, "space='x1'"),
        ({"objective": "best"}, "objective='best'"),
        ({"data_range": (1.0, -1.0)}, "data_range"),
        ({"data_range": (0.0, float("inf"))}, "data_range"),
        ({"grid": 9}, "grid=9"),
    ],
)
def test_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        StageSettings(**changes)
    assert str(error.value).startswith("stages: ")


def test_the_ends_of_what_is_allowed_are_allowed():
    for changes in ({"samples": 100}, {"times": 1}, {"precision": 1e-6}, {"alpha": 1.0}, {"grid": 10}):
        StageSettings(**changes)
    StageSettings(algorithm=2, stages=1, data_range=None)


def test_defaults_depend_on_the_algorithm_only_when_unset():
    first, second = StageSettings().resolved(), StageSettings(algorithm=2).resolved()
    assert (first.samples, first.space) == (1000, "eps")
    assert (second.samples, second.space) == (1000, "x0")
    asked = StageSettings(algorithm=2, space="eps", samples=300).resolved()
    assert (asked.samples, asked.space) == (300, "eps")
    assert StageSettings(space="x0").resolved().space == "x0"


@pytest.mark.parametrize("algorithm", ["timestep", "snr", "gradient"])
def test_baselines_have_no_samples_to_set(algorithm):
    resolved = StageSettings(algorithm=algorithm, stages=5, samples=300, precision=0.1, space="x0").resolved()
    assert (resolved.samples, resolved.precision, resolved.space, resolved.stages) == (None, None, None, 5)


def test_a_precision_lifts_the_number_of_samples_unless_it_is_asked_for():
    assert StageSettings(precision=0.01).resolved().samples == MOST_SAMPLES[1]
    assert StageSettings(precision=0.01, algorithm=2).resolved().samples == MOST_SAMPLES[2]
    assert StageSettings(precision=0.01, samples=500).resolved().samples == 500


def test_resolving_changes_nothing_else_and_nothing_twice():
    settings = StageSettings(eta=0.1, seed=4, rule="pointwise")
    resolved = settings.resolved()
    assert dataclasses.replace(resolved, samples=None, space=None) == settings
    assert resolved.resolved() == resolved


def test_settings_survive_json():
    for settings in (StageSettings(), StageSettings(algorithm=2, stages=5, data_range=None, precision=0.1).resolved()):
        assert from_dict(StageSettings, to_dict(settings)) == settings


def test_require_names_the_command():
    require_setting(True, "nothing")
    with pytest.raises(ValueError, match="stages: x=1 must be 2"):
        require_setting(False, "x=1 must be 2")
