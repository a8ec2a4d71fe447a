from __future__ import annotations

import json

import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.presets import PRESETS, preset
from multistage_diffusion.config.serialization import from_dict, to_dict
from multistage_diffusion.evaluation.extraction import dimensions
from multistage_diffusion.evaluation.features import get_features
from multistage_diffusion.evaluation.moments import MAX_DIMS
from multistage_diffusion.samplers import make_plan
from multistage_diffusion.schedules.vp import VP


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_json(name: str) -> None:
    config = preset(name)
    assert config.name == name
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config), allow_nan=False))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_together(name: str) -> None:
    config = preset(name)
    channels, height, width = config.input_shape
    assert channels == config.network.channels
    assert min(height, width) >= config.network.multiple
    config.network.require_size(height, width)
    assert len(config.network.decoder_widths) == len(config.stages)
    sigmas = make_plan(config.sampling, config.diffusion.schedule).calls
    assert len(sigmas) == config.sampling.calls
    assert {config.stages.index_of(sigma) for sigma in sigmas} == set(range(len(config.stages)))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_evaluated_with_its_features(name: str) -> None:
    config = preset(name)
    shape = config.data.shape or (1, 28, 28)
    assert dimensions(get_features(config.evaluation.features), shape) <= MAX_DIMS


def test_the_published_edges_are_kept_as_printed() -> None:
    vp = VP()
    assert preset("cifar10-dpm").stages.interior == pytest.approx([2.5103, 7.414], rel=1e-4)
    assert preset("cifar10-edm").stages.interior == (2.5103, 7.6577)
    assert vp.time(torch.tensor([2.5103, 7.6577])).tolist() == pytest.approx([0.442, 0.636], abs=5e-4)


def test_the_averaging_of_the_paper_is_one_in_ten_thousand() -> None:
    training = preset("cifar10-dpm").training
    assert 0.5 ** (training.batch / training.ema_halflife) == pytest.approx(0.9999, abs=1e-7)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"preset 'digit' is unknown; did you mean 'digits'\?"):
        preset("digit")
    with pytest.raises(
        ValueError, match="choose one of digits, digits-uvit, fashion-mnist, fashion-mnist-latent, dit-b-latent"
    ):
        preset("zzz")
