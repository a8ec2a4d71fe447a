from __future__ import annotations

import dataclasses
import importlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from multistage_diffusion.files import write_json
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.performance import autotune
from multistage_diffusion.performance.roofline import Convolution, Roofline

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")
pytest.importorskip("diffusers")


@pytest.fixture(name="load")
def fixture_load(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("common", "train_step", "sample", "transformer_step"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_a_peer_costs_about_as_much(load) -> None:
    common = load("common")
    for adds in (3e6, 4e8):
        shape = (1, 8, 8) if adds < 1e7 else (3, 32, 32)
        width, found = common.fitting_width(shape, adds)
        assert found == common.peer_adds(shape, width)
        for other in (width - 8, width + 8):
            if other > 0:
                assert abs(common.peer_adds(shape, other) - adds) >= abs(found - adds)
    # by hand: a 3x3 convolution of an 8x8 image is the first of its layers
    assert common.peer_adds((1, 8, 8), 8) > 8 * 9 * 64


@pytest.mark.slow
def test_a_training_step_is_measured_beside_its_peer(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "LEAST_STEPS", math.inf)
    out = tmp_path / "step.json"
    write_json(out, {"machine": "another", "networks": {"edm": {}}})
    load("train_step").main(
        ["--networks", "digits", "--steps", "1", "--rounds", "2", "--device", "cpu", "--out", str(out)]
    )
    result = json.loads(out.read_text())["networks"]
    assert list(result) == ["digits"]  # what another machine has measured is no neighbour
    digits = result["digits"]
    assert sum(digits["parts"].values()) == pytest.approx(digits["seconds"], rel=0.3)
    assert digits["images_per_s"] == pytest.approx(96 / digits["seconds"])
    ratio = digits["images_per_s"] / digits["peer"]["images_per_s"]
    ratio *= digits["multiply_adds_per_image"] / digits["peer"]["multiply_adds_per_image"]
    assert digits["ratio_per_multiply_add"] == pytest.approx(ratio)
    assert 0 < digits["share_of_convolution"] < 1.5
    assert "times diffusers per multiply-add" in capsys.readouterr().out


@pytest.mark.slow
def test_sampling_is_measured_beside_its_peer(load, tmp_path: Path) -> None:
    out, sample = tmp_path / "sample.json", load("sample")
    arguments = ["--networks", "digits", "--images", "4", "--calls", "6", "--rounds", "1", "--device", "cpu"]
    sample.main([*arguments, "--out", str(out)])
    digits = json.loads(out.read_text())["networks"]["digits"]
    assert (digits["images"], digits["calls"]) == (4, 6)
    stages = network_cost(load("common").configuration("digits", CPU).network, 8, 8).stages
    adds = [stage.true_flops / 2 for stage in stages]
    assert 6 * min(adds) < digits["multiply_adds_per_image"] < 6 * max(adds)
    assert digits["seconds_of_50000"] == pytest.approx(50_000 / digits["images_per_s"])


@pytest.mark.slow
def test_a_transformer_is_measured_beside_its_products_and_its_peer(
    load, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = load("transformer_step")
    monkeypatch.setattr(autotune, "LEAST_STEPS", math.inf)
    network = module.configuration("uvit", 4).network
    products = module.linear_products(network, [2, 1, 1])
    tokens, width = 257, 256  # of patches and noise
    assert products[4 * tokens, width, 3 * width] == 5  # queries, keys and values in the encoder
    assert products[2 * tokens, 2 * width, width] == 4  # skips in the first decoder
    linear = sum(times * 2 * math.prod(product) for product, times in products.items())
    attention = 4 * tokens**2 * width * (4 * 5 + 2 * 4 + 3 + 2)
    convolutions = 4 * 2 * 32 * 32 * 9 * 3 * 3
    stages = network_cost(network, 32, 32).stages
    counted = sum(rows * stage.true_flops for rows, stage in zip([2, 1, 1], stages, strict=True))
    assert counted == linear + attention + convolutions
    depth, flops = module.fitting_depth(4e9)
    assert abs(flops - 4e9) <= abs(module.peer_flops(depth + 1) - 4e9)
    assert flops == pytest.approx(module.peer_flops(depth))
    out = tmp_path / "transformer_step.json"
    arguments = ["--families", "dit", "--batch", "4", "--steps", "1", "--rounds", "1", "--device", "cpu"]
    module.main([*arguments, "--out", str(out)])
    result = json.loads(out.read_text())["networks"]["dit"]
    assert result["images_per_s"] * 3 * result["flops_per_image"] / 1e9 == pytest.approx(result["gflops_per_s"])
    assert result["gflops_per_s"] / result["matrix_gflops_per_s"] == pytest.approx(result["share_of_matrix"])
    assert "times diffusers' DiT per FLOP" in capsys.readouterr().out


def test_a_roofline_measured_several_times_is_its_median(load) -> None:
    common, convolution = load("common"), Convolution(**{field.name: 1 for field in dataclasses.fields(Convolution)})
    found = [
        Roofline(convolution=convolution, channels_last=True, convolution_rate=rate, matrix_rate=10 - rate)
        for rate in (3.0, 1.0, 2.5)
    ]
    roofline = common.median_roofline(found)
    assert (roofline.convolution_rate, roofline.matrix_rate) == (2.5, 7.5)
    assert roofline.convolution == convolution


def test_what_is_kept_of_one_network_stays_when_another_is_measured(load, tmp_path: Path) -> None:
    common = load("common")
    common.keep(tmp_path / "a.json", CPU, {"one": {"images_per_s": 1}})
    common.keep(tmp_path / "a.json", CPU, {"two": {"images_per_s": 2}})
    common.keep(tmp_path / "a.json", CPU, {"one": {"images_per_s": 3}})
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["networks"] == {"one": {"images_per_s": 3}, "two": {"images_per_s": 2}}
    assert found["machine"]["torch"] == torch.__version__


def test_kept_results_are_of_the_networks_that_the_documentation_names() -> None:
    for name in ("train_step", "sample"):
        kept = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())["networks"]
        assert {"ncsnpp-32", "digits", "t7-1", "edm", "t8-4"} <= set(kept)
        for network, measured in kept.items():
            near = 0.5 if network == "digits" else 0.2  # a peer's width goes in steps of eight
            adds = measured["multiply_adds_per_image"]
            assert measured["peer"]["multiply_adds_per_image"] == pytest.approx(adds, rel=near)
