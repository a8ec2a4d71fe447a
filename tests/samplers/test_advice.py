"""The rule that warns of samplers, beside what was measured."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from loading import load

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.config.presets import PRESETS, preset
from multistage_diffusion.samplers import make_plan, sample, shortcoming, start_noise
from multistage_diffusion.schedules import SCHEDULES
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.vp import VP

ROOT = Path(__file__).parents[2]


def load_study() -> ModuleType:
    return load(ROOT / "benchmarks" / "samplers.py", "samplers_study")


@pytest.fixture(scope="module", name="study")
def fixture_study() -> ModuleType:
    return load_study()


@pytest.fixture(scope="module", name="measured")
def fixture_measured(study: ModuleType) -> dict[str, dict[str, dict[str, float]]]:
    errors: dict[str, dict[str, dict[str, float]]] = json.loads(study.RESULT.read_text())["errors"]
    return errors


PUBLISHED = SamplingConfig(lower_final="published", denoise_last="never")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calls": 6, "order": 2, "spacing": "time"}, ["dpm singlestep", "sigma", "order 2", "6 calls"]),
        ({"calls": 10, "solver": "dpm++", "method": "multistep", "spacing": "time"}, ["dpm++ multistep", "order 3"]),
        (
            {"calls": 10, "solver": "dpm", "method": "multistep", "order": 2, "spacing": "time"},
            ["last step", "order 2"],
        ),
        ({"calls": 20, "solver": "heun", "spacing": "time"}, ["heun", "long", "--lower-final always"]),
        ({"calls": 12, "solver": "heun", "spacing": "edm", "lower_final": "always"}, ["heun: 12 calls are few", "20"]),
    ],
)
def test_what_falls_short_is_told_in_one_line(changes, words):
    reason = shortcoming(make_plan(dataclasses.replace(PUBLISHED, **changes), VP()))
    assert reason is not None
    assert all(word in reason for word in words), reason
    assert "\n" not in reason


@pytest.mark.parametrize("schedule", [VP(), EDM(), Discrete()], ids=lambda s: s.kind)
@pytest.mark.parametrize("calls", [5, 10, 20, 50])
def test_lowered_orders_are_not_warned_of(schedule, calls):
    for solver in ("dpm", "dpm++", "ddim"):
        for method in ("singlestep", "multistep"):
            for spacing in ("log-snr", "time", "edm"):
                config = SamplingConfig(solver=solver, method=method, calls=calls, spacing=spacing)
                assert shortcoming(make_plan(config, schedule)) is None


@pytest.mark.parametrize("name", PRESETS)
def test_no_preset_is_warned_of(name):
    config = preset(name)
    assert shortcoming(make_plan(config.sampling, config.diffusion.schedule)) is None


@pytest.mark.slow
def test_no_preset_and_no_default_is_worse_than_ddim(study):
    denoiser, shape = study.mixture()
    known = {(c.sampling, c.diffusion.schedule) for c in map(preset, PRESETS)}
    for config, schedule in known | {(SamplingConfig(), SCHEDULES[kind]()) for kind in SCHEDULES}:
        ddim = dataclasses.replace(
            config, solver="ddim", denoise_last="always" if config.solver == "heun" else config.denoise_last
        )
        fine = dataclasses.replace(ddim, solver="dpm++", method="multistep", order=3, calls=200, spacing="log-snr")
        ends = []
        for one in (config, ddim, fine):
            plan = make_plan(one, schedule)
            start = start_noise(0, torch.arange(100), shape, plan, torch.float64)
            ends.append(sample(denoiser, start, plan))
        mine, other = (float((end - ends[2]).square().mean().sqrt()) for end in ends[:2])
        assert mine <= 1.1 * other, (config, schedule)


@pytest.mark.parametrize(
    "kind", [k if k in ("vp", "discrete") else pytest.param(k, marks=pytest.mark.slow) for k in SCHEDULES]
)
def test_the_rule_names_what_was_measured_to_be_worse(study, measured, kind):
    missed = []
    for rule in ("always", "published"):
        for rows in measured.values():
            worse = study.beside_ddim(rows, rule)
            for key in rows:
                schedule, spacing, setting, of = key.split(" / ")
                if of != rule or schedule != kind or setting.startswith("ddim"):
                    continue
                config = dict(study.settings(rule))[setting]
                bad = worse.get(f"{schedule} / {spacing} / {setting}", {})
                assert not (bad and rule == "always" and setting != "heun"), key  # none of DPM's is worse
                for calls in bad:
                    plan = make_plan(dataclasses.replace(config, spacing=spacing, calls=calls), SCHEDULES[kind]())
                    if shortcoming(plan) is None:
                        missed.append((rule, key, calls))
    assert len([m for m in missed if m[0] == "always"]) <= 1, missed
    assert len(missed) <= 2, missed


def test_the_page_shows_what_was_measured(study, measured):
    page = (ROOT / "docs" / "sampling.md").read_text()
    assert study.counts(measured) in page
    assert study.tables(measured) in page


@pytest.mark.slow
def test_a_small_study_runs_from_end_to_end(study, tmp_path, capsys):
    out = tmp_path / "few.json"
    study.main(
        ["--data", "mixture", "--schedules", "vp", "--calls", "5", "10", "--trajectories", "8", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["errors"]["mixture"]
    assert len(rows) == 3 * (2 + 2 * 9)
    assert all(set(row) == {"5", "10"} for row in rows.values())
    study.main(["--tables", "--out", str(out)])
    assert capsys.readouterr().out == printed


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(SCHEDULES))
def test_the_study_is_as_recorded(study, measured, kind):
    calls = (5, 10, 20)
    found = study.errors("mixture", [SCHEDULES[kind]()], calls, 1000)
    for key, row in found.items():
        assert row == pytest.approx({str(n): measured["mixture"][key][str(n)] for n in calls}, rel=1e-2), key
