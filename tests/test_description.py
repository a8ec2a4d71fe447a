from __future__ import annotations

import json
import math
from typing import Any

import pytest

from multistage_diffusion.config import RunConfig, SamplingConfig
from multistage_diffusion.description import architecture_rows, describe, description_table, edge_time
from multistage_diffusion.presets import preset
from multistage_diffusion.schedules import EDM, VP, Discrete
from multistage_diffusion.serialization import override

DESCRIBED = ("digits", "fashion-mnist", "cifar10-dpm", "cifar10-edm-one-stage")  # counting the largest takes long


@pytest.fixture(scope="module")
def described() -> dict[str, dict[str, Any]]:
    return {name: describe(preset(name)) for name in DESCRIBED}


def test_the_published_network_has_the_published_numbers(described: dict[str, dict[str, Any]]) -> None:
    published = described["cifar10-dpm"]
    stages = published["stages"]
    assert [round(s["parameters"] / 1e6) for s in stages] == [169, 108, 47]  # Table 7, row 1
    assert [s["calls"] for s in stages] == [12, 2, 6]  # 20 calls, even in log-SNR, cut at t = 0.442 and 0.631
    assert [s["t"] for s in stages] == [
        pytest.approx([0.0, 0.442]),
        pytest.approx([0.442, 0.631]),
        pytest.approx([0.631, 1.0]),
    ]
    shared = published["shared_parameters"]
    assert published["parameters"] == shared + sum(s["parameters"] - shared for s in stages)
    average = sum(s["calls"] * s["multiply_adds"] for s in stages) / 20
    assert published["multiply_adds_by_calls"] == pytest.approx(average)


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_description_is_plain_json(name: str, described: dict[str, dict[str, Any]]) -> None:
    one = described[name]
    assert json.loads(json.dumps(one, allow_nan=False)) == one
    assert one["stages"][-1]["sigma"][1] is None
    assert all(s["flops"] >= 2 * s["multiply_adds"] for s in one["stages"])


def test_another_sampler_changes_the_calls_only(described: dict[str, dict[str, Any]]) -> None:
    config, own = preset("digits"), described["digits"]
    other = describe(config, SamplingConfig(solver="heun", calls=19, sigma_max=30.0))
    assert sum(s["calls"] for s in own["stages"]) == config.sampling.calls
    assert sum(s["calls"] for s in other["stages"]) == 19
    assert own["parameters"] == other["parameters"]


def test_separate_networks_share_nothing() -> None:
    separate = describe(override(preset("digits"), {"network.separate": True}))
    assert separate["shared_parameters"] == 0
    assert separate["parameters"] == sum(s["parameters"] for s in separate["stages"])
    assert [row.name for row in architecture_rows(separate)] == ["stage 1", "stage 2", "stage 3", "whole network"]
    assert "shared encoder" not in description_table(separate)


def test_rows_of_the_report_say_the_same(described: dict[str, dict[str, Any]]) -> None:
    digits = described["digits"]
    first, _, last, shared, whole = architecture_rows(digits)
    assert first.sigma == tuple(digits["stages"][0]["sigma"])
    assert last.sigma is not None
    assert last.sigma[1] == math.inf
    assert first.t == tuple(digits["stages"][0]["t"])
    assert (shared.name, shared.parameters) == ("shared encoder", digits["shared_parameters"])
    assert (whole.parameters, whole.multiply_adds) == (digits["parameters"], None)


def test_the_table_names_every_stage_with_its_numbers(described: dict[str, dict[str, Any]]) -> None:
    table = description_table(described["cifar10-dpm"])
    lines = {line[:7]: line.split() for line in table.splitlines()}
    assert "cifar10-dpm: ncsnpp, images 3 x 32 x 32" in table
    assert lines["stage 1"][-4:] == ["192", "169.5", "29920", "12"]
    assert lines["stage 3"][2:4] == ["[7.41,", "inf)"]
    assert lines["encoder"] == ["encoder", "128", "43.48", "5740.3"]
    assert "237.2 M parameters" in table
    assert max(map(len, table.splitlines())) <= 80


@pytest.mark.parametrize("schedule", [VP(), EDM(), Discrete()])
def test_open_ends_have_finite_times(schedule: VP | EDM | Discrete) -> None:
    assert edge_time(schedule, 0.0) == 0.0
    assert edge_time(schedule, math.inf) == schedule.t_max
    assert edge_time(schedule, 2.0) == schedule.edge_time(2.0)


def test_no_shape_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"data.shape=\[\] must be \[channels, height, width\]"):
        describe(RunConfig())
