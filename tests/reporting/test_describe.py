from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from multistage_diffusion.config import RunConfig, SamplingConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.reporting.describe import (
    architecture_rows,
    calls_per_stage,
    describe,
    description_table,
    edge_time,
    sampler_words,
    sampling_flops,
    training_table,
)
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.schedules.vp import VP

DESCRIBED = ("digits", "cifar10-dpm", "cifar10-edm-one-stage", "celebahq-ldm")  # counting the largest takes long


@pytest.fixture(scope="module")
def described() -> dict[str, dict[str, Any]]:
    return {name: describe(preset(name)) for name in DESCRIBED}


@pytest.mark.slow
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


def test_totals_are_weighted_as_the_papers_tables_weight_them(described: dict[str, dict[str, Any]]) -> None:
    table7 = described["cifar10-dpm"]
    assert [s["length"] for s in table7["stages"]] == pytest.approx([0.442, 0.189, 0.369])
    by_hand = 0.442 * 29.92 + 0.189 * 17.605 + 0.369 * 6.3  # Table 7, row 1, as we count its stages
    assert table7["multiply_adds_by_length"] / 1e9 == pytest.approx(by_hand, rel=2e-3)
    adds = [s["multiply_adds"] / 1e9 for s in table7["stages"]]
    printed = 0.426 * adds[0] + 0.2 * adds[1] + 0.374 * adds[2]  # the lengths that the printed total fits
    assert printed == pytest.approx(18.65, rel=4e-3)
    table8 = described["celebahq-ldm"]
    assert [s["calls"] for s in table8["stages"]] == [8, 4, 8]
    assert table8["multiply_adds_by_calls"] / 1e9 == pytest.approx(76.19, rel=4e-3)  # Table 8, row 4
    assert [s["length"] for s in table8["stages"]] == pytest.approx([442 / 999, 189 / 999, 368 / 999])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "total"), [("cifar10-dpm-four-stages", 17.33), ("cifar10-dpm-five-stages", 17.03)])
def test_table_9_is_weighted_by_the_presets_own_lengths(name: str, total: float) -> None:
    assert describe(preset(name))["multiply_adds_by_length"] / 1e9 == pytest.approx(total, rel=4e-3)


@pytest.mark.parametrize("name", DESCRIBED)
def test_flops_are_averaged_as_multiply_adds_are(name: str, described: dict[str, dict[str, Any]]) -> None:
    one = described[name]
    stages = one["stages"]
    assert sum(s["length"] for s in stages) == pytest.approx(1.0)
    assert one["flops_by_length"] == pytest.approx(sum(s["length"] * s["flops"] for s in stages))
    calls = one["sampler"]["calls"]
    assert calls == sum(s["calls"] for s in stages)
    assert one["flops_by_calls"] == pytest.approx(sum(s["calls"] * s["flops"] for s in stages) / calls)


def test_the_sampler_is_named(described: dict[str, dict[str, Any]]) -> None:
    assert described["cifar10-dpm"]["sampler"] == {
        "solver": "dpm",
        "method": "singlestep",
        "order": 3,
        "calls": 20,
        "spacing": "log-snr",
    }
    words = sampler_words(described["cifar10-dpm"]["sampler"])
    assert words == "20 calls of dpm, singlestep, order 3, log-snr spacing"
    sampling = SamplingConfig(solver="heun", calls=20, spacing="edm", sigma_max=30.0, lower_final="published")
    heun = describe(preset("digits"), sampling)["sampler"]
    assert heun == {"solver": "heun", "method": None, "order": None, "calls": 19, "spacing": "edm"}
    assert sampler_words(heun) == "19 calls of heun, edm spacing"


def test_a_latent_run_is_described_by_its_latents() -> None:
    config = override(preset("digits"), {"codec.shape": [4, 4, 6], "network.channels": 4, "data.shape": [3, 32, 48]})
    described = describe(config)
    assert (described["input"], described["shape"]) == ("latents", [4, 4, 6])
    assert "ddpmpp, latents 4 x 4 x 6" in description_table(described)
    with pytest.raises(ValueError, match=r"codec.shape=\[\] must be \[channels, height, width\]"):
        describe(override(config, {"codec.shape": [], "codec.source": "codecs/none"}))


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
    assert separate["encoder_width"] is None
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
    network, training = table.split("training  noise")
    lines = {line[:7]: line.split() for line in network.splitlines()}
    assert "cifar10-dpm: ncsnpp, images 3 x 32 x 32" in table
    assert lines["stage 1"][-4:] == ["192", "169.5", "29.92", "12"]
    assert lines["stage 3"][2:4] == ["[7.41,", "inf)"]
    assert lines["encoder"] == ["encoder", "128", "43.48", "5.7403"]
    shares = {line[:7]: line.split()[2:] for line in training.splitlines()}
    assert shares["stage 1"] == ["44.1%", "33.3%", "33.3%", "54.6%"]
    assert "237.2 M parameters" in table
    assert "21.605 G over 20 calls of dpm, singlestep, order 3, log-snr spacing" in table
    assert "18.881 G over times uniform in t" in table
    assert max(map(len, table.splitlines())) <= 80


def test_the_table_of_the_training_is_that_of_the_description(described: dict[str, dict[str, Any]]) -> None:
    head, *lines = training_table(override(preset("digits"), {"data.shape": [1, 8, 8]})).splitlines()
    assert head.split() == ["training", "sigma", "noise", "rows", "steps", "compute"]
    for line, stage in zip(lines, described["digits"]["stages"], strict=True):
        shares = [f"{stage['training'][name]:.1%}" for name in ("noise", "rows", "steps", "compute")]
        low, high = stage["sigma"]
        assert line.split()[:2] == ["stage", str(stage["stage"])]
        assert line.split()[2:4] == [f"[{low:.3g},", f"{math.inf if high is None else high:.3g})"]
        assert line.split()[4:] == shares


def test_a_stage_s_share_of_the_training_is_that_of_its_rows_and_their_cost(
    described: dict[str, dict[str, Any]],
) -> None:
    stages = (
        described["cifar10-edm"]["stages"] if "cifar10-edm" in described else describe(preset("cifar10-edm"))["stages"]
    )
    mass = preset("cifar10-edm").diffusion.prior.mass
    shares = [s["training"] for s in stages]
    assert [s["noise"] for s in shares] == [mass(s["sigma"][0], s["sigma"][1] or math.inf) for s in stages]
    cost = [s["training"]["rows"] * s["flops"] for s in stages]
    assert [s["compute"] for s in shares] == pytest.approx([c / sum(cost) for c in cost])
    assert sum(s["rows"] for s in shares) == pytest.approx(1)
    assert [s["rows"] for s in shares] == [s["steps"] for s in shares]  # a stage per step
    mixed = describe(override(preset("cifar10-edm"), {"training.update_mode": "mixed", "training.batch": 128}))[
        "stages"
    ]
    assert [s["training"]["rows"] * 128 for s in mixed] == [123, 4, 1]  # each stage has a row
    assert [s["training"]["steps"] for s in mixed] == [1, 1, 1]


@pytest.mark.parametrize("schedule", [VP(), EDM(), Discrete()])
def test_open_ends_have_finite_times(schedule: VP | EDM | Discrete) -> None:
    assert edge_time(schedule, 0.0) == 0.0
    assert edge_time(schedule, math.inf) == schedule.t_max
    assert edge_time(schedule, 2.0) == schedule.edge_time(2.0)


def test_no_shape_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"data.shape=\[\] must be \[channels, height, width\]"):
        describe(RunConfig())


def test_sampling_costs_what_its_calls_cost() -> None:
    config = preset("cifar10-edm")
    sampling = dataclasses.replace(config.sampling, solver="ddim", calls=10)
    calls = calls_per_stage(config, sampling)
    assert sum(calls) == 10
    stages = network_cost(config.network, 32, 32).stages
    assert sampling_flops(config, sampling) == sum(n * stage.true_flops for n, stage in zip(calls, stages, strict=True))
    one = override(config, {"stages.interior": [], "network.decoder_widths": [128]})
    assert sampling_flops(one, sampling) == 10 * network_cost(one.network, 32, 32).stages[0].true_flops
