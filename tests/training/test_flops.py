from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from multistage_diffusion.config import RunConfig
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.shares import row_counts, stage_shares, stage_weights
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.flops import flops_per_image
from multistage_diffusion.training.losses import objective, stage_losses

# MEME is left out: its mixers have depthwise convolutions, whose weight gradients torch's counter takes for full ones.
VP = {"diffusion__precondition": "vp-eps", "diffusion__prior__kind": "uniform-time"}
FAMILIES = {
    "ddpmpp": {},
    "separate": {"network__separate": True},
    "ncsnpp": {"network__family": "ncsnpp", **VP, "diffusion__prior__schedule": {"kind": "vp"}},
    "ldm": {"network__family": "ldm", "network__encoder_width": 64, "network__decoder_widths": (96, 64, 64)},
    "dit": {"network__family": "dit", "network__head_channels": 16},
    "uvit": {"network__family": "uvit", "network__head_channels": 16},
    "latents": {"codec__shape": (3, 16, 16), "data__shape": (1, 64, 64)},
}


@pytest.fixture
def small(tiny_config):
    """Make configurations whose first layer, which has no input gradient, is small beside the others."""

    def make(**changes) -> RunConfig:
        settings = {
            "network__encoder_width": 32,
            "network__decoder_widths": (48, 32, 16),
            "network__channel_mult": (1, 2),
            "network__blocks_per_level": 2,
            "network__attention_factors": (2,),
            "network__channels": 3,
            "data__shape": (3, 16, 16),
            "training__shares": (0.6, 0.3, 0.1),
        }
        if changes.get("network__family") in ("dit", "uvit"):
            unet = ("network__channel_mult", "network__blocks_per_level", "network__attention_factors")
            settings = {key: value for key, value in settings.items() if key not in unet}
        return tiny_config(**{**settings, **changes})

    return make


def measured(config: RunConfig, counts: tuple[int, ...], data) -> float:
    """Return the FLOPs of a real step with these rows."""
    denoiser, source = build_denoiser(config), BatchSource(config, data, torch.device("cpu"))
    weights = stage_weights(config.training, config.stages, config.diffusion.prior)
    # only this kind of attention consists of products that the counter knows
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        objective(stage_losses(denoiser, source.draw(0, counts)), weights, counts).backward()
    return float(counter.get_total_flops())


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(
            f, marks=[pytest.mark.slow] * (f in ("ncsnpp", "latents", "separate", "ldm", "ddpmpp", "dit", "uvit"))
        )
        for f in FAMILIES
    ],
)
def test_they_are_those_of_a_real_step(small, tiny_data, family):
    config = small(**FAMILIES[family])
    shares = stage_shares(config.training, config.stages, config.diffusion.prior)
    counts = row_counts(config.training, shares)
    assert counts == (7, 4, 1)
    data = tiny_data(shape=(3, 16, 16))
    assert flops_per_image(config) == pytest.approx(measured(config, counts, data) / 12, rel=0.03)
    config = small(**FAMILIES[family], training__update_mode="sequential")
    apart = sum(measured(config, tuple(c if j == k else 0 for j in range(3)), data) for k, c in enumerate(counts))
    assert flops_per_image(config) == pytest.approx(apart / 12, rel=0.03)


@pytest.mark.slow
def test_where_a_step_trains_one_stage_its_share_of_steps_counts(small, tiny_data):
    config = small(training__update_mode="one-stage")
    steps = [
        measured(config, tuple(12 if j == k else 0 for j in range(3)), tiny_data(shape=(3, 16, 16))) for k in range(3)
    ]
    expected = 0.6 * steps[0] + 0.3 * steps[1] + 0.1 * steps[2]
    assert flops_per_image(config) == pytest.approx(expected / 12, rel=0.03)


def test_a_shape_must_be_known(tiny_config):
    with pytest.raises(ValueError, match=r"data\.shape=\[\] must be"):
        flops_per_image(tiny_config(data__shape=()))
    with pytest.raises(ValueError, match=r"codec\.shape=\[\] must be"):
        flops_per_image(tiny_config(codec__source="codec"))
