from __future__ import annotations

import pytest

from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.config.sampling import changed_sampler
from multistage_diffusion.errors import UserError

OWN = SamplingConfig(solver="dpm", method="singlestep", order=3, calls=20, spacing="time")


def test_settings_that_are_not_changed_are_the_run_s() -> None:
    assert changed_sampler(OWN, None) == changed_sampler(OWN, {}) == OWN
    found = changed_sampler(OWN, {"calls": 50})
    assert found == SamplingConfig(solver="dpm", method="singlestep", order=3, calls=50, spacing="time")
    whole = SamplingConfig(solver="heun", calls=35)
    assert changed_sampler(OWN, whole) is whole


def test_a_solver_without_a_setting_refuses_it_and_drops_the_run_s() -> None:
    assert changed_sampler(OWN, {"solver": "heun", "calls": 35}).solver == "heun"
    with pytest.raises(UserError, match=r"sampling\.order=3: has no meaning for solver 'ddim'; leave it out"):
        changed_sampler(OWN, {"solver": "ddim", "order": 3})


def test_unknown_settings_and_values_are_named() -> None:
    with pytest.raises(UserError, match="cals"):
        changed_sampler(OWN, {"cals": 3})
    with pytest.raises(UserError, match=r"sampling\.calls=0"):
        changed_sampler(OWN, {"calls": 0})
    with pytest.raises(UserError, match=r"sampling\.solver"):
        changed_sampler(OWN, {"solver": "best"})
