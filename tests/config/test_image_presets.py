"""Presets for one's own images: each is whole, and larger images and devices get more."""

from __future__ import annotations

import pytest

from multistage_diffusion.config.image_presets import IMAGE_PRESETS, IMAGE_SIZES, preset_name
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.performance.offload import training_memory
from multistage_diffusion.shares import stage_training


def test_every_size_has_a_preset_for_cpu_and_gpu() -> None:
    assert {preset_name(size, device) for size in IMAGE_SIZES for device in ("cpu", "gpu")} == set(IMAGE_PRESETS)
    assert IMAGE_SIZES == (32, 64, 128, 256)


@pytest.mark.parametrize(
    "name", [n if n.endswith("32-cpu") else pytest.param(n, marks=pytest.mark.slow) for n in IMAGE_PRESETS]
)
def test_a_preset_starves_no_stage_and_fits_its_device(name: str) -> None:
    config = IMAGE_PRESETS[name]()
    shares = [share for _, share, _ in stage_training(config.training, config.stages, config.diffusion.prior)]
    assert min(shares) > 0.03
    cost = network_cost(config.network, *config.input_shape[1:])
    flops = [stage.true_flops for stage in cost.stages]
    assert flops == sorted(flops, reverse=True)  # most compute where detail is
    limit = 8 if name.endswith("cpu") else 120  # float32; half precision takes about half, and auto divides batches
    assert training_memory(config, config.training.batch) < limit * 2**30
    assert (config.codec.shape != ()) == (config.data.size == (256, 256))
