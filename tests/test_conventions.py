"""A boundary in the conventions of different code."""

from __future__ import annotations

import json
import math

import pytest

import multistage_diffusion as msd
from multistage_diffusion import cli
from multistage_diffusion.conventions import CONVENTIONS, Boundary, boundary, boundary_lines
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.vp import VP

RELEASED = [(3.0, 0.9, 0.25, 251), (5.0, 0.9, 0.3571, 358), (5.0, 0.875, 0.4167, 417)]


@pytest.mark.parametrize(("shift", "ratio", "index", "count"), RELEASED)
def test_boundaries_of_released_two_expert_models(shift: float, ratio: float, index: float, count: int) -> None:
    found = msd.boundary(ratio, "boundary-ratio", shift=shift)
    assert round(found.index, 4) == index
    assert found.steps_above == count
    assert found.t_flow == pytest.approx(ratio / (shift - (shift - 1) * ratio), rel=1e-12)


@pytest.mark.parametrize(("shift", "ratio", "index", "count"), RELEASED)
def test_as_many_steps_are_above_as_comparing_each_shifted_step_gives(
    shift: float, ratio: float, index: float, count: int
) -> None:
    # in integers, as rounding would decide where a step is on the boundary: t = s u/(1 + (s-1) u) >= r, u = k/1000
    s, r = round(shift), round(ratio * 1000)
    above = [k for k in range(1, 1001) if 1000 * s * k >= r * (1000 + (s - 1) * k)]
    assert len(above) == count


@pytest.mark.parametrize("steps", [1, 7, 1000])
@pytest.mark.parametrize("shift", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_each_convention_leads_back_to_the_same_noise(name: str, shift: float, steps: int) -> None:
    given = Boundary(sigma=2.5103, shift=shift, steps=steps)
    value = given.conventions()[name]
    assert value is not None
    found = boundary(value, name, shift=shift, steps=steps)
    assert found.sigma == pytest.approx(given.sigma, rel=1e-11)
    assert found.steps_above == given.steps_above


def test_values_are_those_of_the_schedules() -> None:
    found = boundary(0.442, "t-vp", shift=3)
    assert found.sigma == pytest.approx(float(VP().sigma(0.442)), rel=1e-12)
    assert found.t_shifted == found.boundary_ratio == pytest.approx(float(RectifiedFlow().time(found.sigma)), rel=1e-12)
    assert found.log_snr == pytest.approx(-2 * math.log(found.sigma))
    assert found.t_edm == found.sigma
    u = found.t_flow
    assert 3 * u / (1 + 2 * u) == pytest.approx(found.t_shifted, rel=1e-12)
    assert found.step == pytest.approx(1000 * (1 - u))


def test_noise_beyond_vp_has_no_time_there() -> None:
    assert boundary(1.0, "t-vp").t_vp == pytest.approx(1.0, abs=1e-12)
    found = boundary(1000.0)
    assert found.t_vp is None
    assert "beyond its range" in "\n".join(boundary_lines(found))


def test_the_first_step_counts_when_it_alone_is_above() -> None:
    assert boundary(1e9).steps_above == 1
    assert boundary(1e-9).steps_above == 1000


@pytest.mark.parametrize(
    ("value", "convention", "options", "words"),
    [
        (1.0, "boundary-ratio", {}, "boundary-ratio=1 must be above 0 and below 1"),
        (0.0, "sigma", {}, "sigma=0 must be above 0 and finite"),
        (math.nan, "log-snr", {}, "log-snr=nan must be finite"),
        (60.0, "log-snr", {}, "log-snr=60 must be between -55 and 55"),
        (1000, "step", {}, "step=1000 must be above 0 and below 1000"),
        (0.5, "flow", {}, "convention='flow' must be one of sigma"),
        (0.5, "t-flow", {"shift": 0}, "shift=0 must be between 0.001 and 1000"),
        (0.5, "t-flow", {"steps": 0}, "steps=0 must be between 1 and 10"),
        (1e-300, "index", {}, "index=1e-300 is sigma 1e+300, which must be between 1e-12 and 1e12"),
        (1.5, "t-vp", {}, "t-vp=1.5 must be above 0 and at most 1"),
        (1e13, "sigma", {}, "sigma=1e+13 must be between 1e-12 and 1e12"),
    ],
)
def test_impossible_values_are_refused(value: float, convention: str, options: dict[str, float], words: str) -> None:
    with pytest.raises(msd.UserError, match=r"must be") as caught:
        boundary(value, convention, **options)  # type: ignore[arg-type]
    assert words in str(caught.value)


def test_the_command_prints_all_conventions(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["boundary", "0.9", "--as", "boundary-ratio", "--shift", "5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CONVENTIONS)
    assert lines[CONVENTIONS.index("index")].split()[1] == "0.357143"
    assert "at or above it: 358" in lines[-1]
    assert cli.main(["boundary", "0.9", "--as", "t-shifted", "--shift", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps_above"] == 251
    assert found["t_flow"] == pytest.approx(0.75)
    assert cli.main(["boundary", "2", "--as", "t-flow"]) == 2
    assert capsys.readouterr().err == "msdiff: t-flow=2 must be above 0 and below 1\n"


@pytest.mark.parametrize(("value", "name"), [(1e-17, "index"), (1e-14, "step"), (1e-300, "step")])
def test_noise_beyond_all_bounds_is_refused(value: float, name: str) -> None:
    with pytest.raises(msd.UserError, match=rf"{name}=.* is sigma .*, which must be between 1e-12 and 1e12"):
        boundary(value, name)


def test_small_indices_keep_their_digits() -> None:
    assert boundary(3e-12, "index").index == pytest.approx(3e-12, rel=1e-12)
    assert boundary(3e-9, "step").step == pytest.approx(3e-9, rel=1e-12)
    with pytest.raises(msd.UserError, match=r"steps=10000000000 must be between 1 and 10\^9"):
        boundary(1.0, steps=10**10)
