"""What an export tells the original code, and where that code would compute something else with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.paper_presets import PAPER_PRESETS
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.interop.edm import DDPMPP
from multistage_diffusion.training.checkpoint import Checkpoint, save_checkpoint
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.exchange import layout_of
from multistage_diffusion.workflow.export import (
    _arguments,
    differences,
    diffusion_buffers,
    export_published,
    original_settings,
)


def test_exported_arguments_are_those_of_the_original_constructor(tmp_path: Path) -> None:
    several, one = (preset(name) for name in ("cifar10-edm", "cifar10-edm-one-stage"))
    common = {"img_resolution", "img_channels", "label_dim", "sigma_data", "model_type", "channel_mult", "num_blocks"}
    common |= {"attn_resolutions", "augment_dim", "dropout", *DDPMPP}
    assert set(_arguments(one, (32, 32))) == common | {"model_channels"}
    found = _arguments(several, (32, 32))
    assert set(found) == common | {"en_model_channels", "de_model_channels", "stage_num", "stage_interval"}
    assert (found["model_type"], found["en_model_channels"], found["de_model_channels"], found["stage_num"]) == (
        "MultistageUNet",
        128,
        [192, 128, 16],
        3,
    )
    assert found["stage_interval"] == [[[0.0, 2.5103]], [[2.5103, 7.6577]], [[7.6577, float("inf")]]]
    assert found["attn_resolutions"] == [16]


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_exports_of_the_paper_s_networks_compute_the_same_in_the_original_code(name: str) -> None:
    config = preset(name)
    if layout_of(config):
        assert differences(config) == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (
            "cifar10-edm-one-stage",
            {"network.norm_groups": 16},
            "GroupNorms have up to 32 groups: it would compute",
        ),
        ("cifar10-dpm-one-stage", {"network.norm_groups": 16}, "train with network.norm_groups=32 for exports"),
        ("cifar10-edm", {"network.norm_groups": 32}, "train with network.norm_groups=16 for exports"),
        ("cifar10-dpm", {"data.shape": [3, 28, 28]}, "inputs of 28 x 28 are padded to multiples of 8 here"),
        (
            "celebahq-ldm-one-stage",
            {"network.decoder_attention": [False]},
            "the original code builds [True]; it cannot load",
        ),
        ("celebahq-ldm", {"codec.shift": 0.1}, "codec.shift=0.1: the original code has no shift"),
    ],
)
def test_what_the_original_code_would_read_differently_is_said(
    name: str, changes: dict[str, object], words: str
) -> None:
    (said,) = differences(override(preset(name), changes))
    assert words in said


def test_an_export_warns_of_differences(tiny_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    wide = {"network.encoder_width": 128, "network.decoder_widths": [128], "stages.interior": []}
    config = override(tiny_config(), wide)
    run = Run.create(tmp_path / "run", config)
    state = dict(build_denoiser(config).state_dict())
    saved = {"step": 5, "score": None, "config": config}
    save_checkpoint(run.checkpoints, Checkpoint(model=state, ema=state, optimizer={}, state=saved))
    with pytest.warns(UserWarning, match="x.safetensors: network.norm_groups=16, but the original code's GroupNorms"):
        export_published(run, tmp_path / "x.safetensors")


def test_an_export_tells_what_the_original_configuration_must_say() -> None:
    assert original_settings(preset("cifar10-edm")) == {}
    assert original_settings(preset("cifar10-dpm-one-stage")) == {}
    assert original_settings(preset("celebahq-ldm")) == {
        "beta_schedule": "linear",
        "linear_start": 0.0015,
        "linear_end": 0.0195,
        "timesteps": 1000,
        "num_head_channels": 32,
        "scale_factor": 1.0,
        "stage_interval": [442, 631, 1000],
    }


def test_the_constants_of_an_exported_diffusion_follow_from_its_betas() -> None:
    betas = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    found = diffusion_buffers(betas)
    # by hand: alpha_bar = 0.9, 0.72, 0.432
    assert found["alphas_cumprod"].tolist() == pytest.approx([0.9, 0.72, 0.432])
    assert found["alphas_cumprod_prev"].tolist() == pytest.approx([1.0, 0.9, 0.72])
    assert found["posterior_variance"].tolist() == pytest.approx([0.0, 0.2 * 0.1 / 0.28, 0.4 * 0.28 / 0.568])
    assert found["posterior_mean_coef1"].tolist() == pytest.approx(
        [1.0, 0.2 * 0.9**0.5 / 0.28, 0.4 * 0.72**0.5 / 0.568]
    )
    assert found["posterior_mean_coef2"].tolist() == pytest.approx(
        [0.0, 0.1 * 0.8**0.5 / 0.28, 0.28 * 0.6**0.5 / 0.568]
    )
    assert found["sqrt_recipm1_alphas_cumprod"].tolist() == pytest.approx(
        [(1 / a - 1) ** 0.5 for a in (0.9, 0.72, 0.432)]
    )
    assert found["posterior_log_variance_clipped"][0] == pytest.approx(math.log(1e-20))
