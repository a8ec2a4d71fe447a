from __future__ import annotations

import dataclasses

import pytest

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.config.paper_presets import PAPER_PRESETS
from multistage_diffusion.config.presets import PRESETS, preset
from multistage_diffusion.nets.cost import network_cost, weighted_multiply_adds
from multistage_diffusion.reporting.describe import calls_per_stage
from multistage_diffusion.schedules.vp import VP

DPM = [name for name in PAPER_PRESETS if name.startswith("cifar10-dpm")]
LDM = [name for name in PAPER_PRESETS if name.startswith("celebahq-ldm")]


@pytest.mark.parametrize("name", PAPER_PRESETS)
def test_a_paper_preset_is_a_preset_of_its_name(name: str) -> None:
    assert PRESETS[name] is PAPER_PRESETS[name]
    assert preset(name).name == name
    assert preset(name).data.source == ""  # the images are the user's to name


@pytest.mark.parametrize(
    ("name", "edges_t"),
    [
        ("cifar10-dpm-one-stage", []),
        ("cifar10-dpm-two-stages", [0.476]),
        ("cifar10-dpm", [0.442, 0.631]),
        ("cifar10-dpm-four-stages", [0.376, 0.526, 0.726]),
        ("cifar10-dpm-five-stages", [0.376, 0.476, 0.626, 0.776]),
        ("cifar10-dpm-separate", [0.442, 0.631]),
        ("cifar10-meme", [0.25, 0.5, 0.75]),
        ("cifar10-edm", [0.442, 0.636]),
        ("cifar10-edm-separate", [0.442, 0.636]),
        ("cifar10-edm-one-stage", []),
        ("celeba32-edm", [0.442, 0.636]),
    ],
)
def test_stages_are_cut_at_the_published_times(name: str, edges_t: list[float]) -> None:
    found = [float(VP().time(sigma)) for sigma in preset(name).stages.interior]
    assert found == pytest.approx(edges_t, abs=5e-4)


def test_rows_of_table_7_differ_in_widths_only() -> None:
    for name in DPM:
        config, chosen = preset(name), preset("cifar10-dpm")
        assert (config.optimizer, config.training, config.sampling) == (
            chosen.optimizer,
            chosen.training,
            chosen.sampling,
        )
        assert (config.optimizer.lr, config.optimizer.betas, config.optimizer.clip) == (2e-4, (0.9, 0.999), 1.0)
        assert (config.training.steps, config.training.batch, config.network.dropout) == (250_000, 128, 0.1)


@pytest.mark.slow
def test_the_edm_networks_have_their_known_sizes() -> None:
    cost = network_cost(preset("cifar10-edm").network, 32, 32)
    assert cost.shared_parameters / 1e6 == pytest.approx(19.6, abs=0.05)
    assert [s.parameters / 1e6 for s in cost.stages] == pytest.approx([87.9, 55.7, 24.4], abs=0.05)
    assert [s.multiply_adds / 1e9 for s in cost.stages] == pytest.approx([35.56, 21.02, 7.58], abs=0.005)
    # The baseline is the middle stage alone: the published EDM network for CIFAR-10 has 55.7 M parameters.
    assert network_cost(preset("cifar10-edm-one-stage").network, 32, 32).total_parameters == cost.stages[1].parameters


def test_the_edm_networks_train_on_the_published_augmentation() -> None:
    for name in ("cifar10-edm", "cifar10-edm-one-stage", "cifar10-edm-separate", "celeba32-edm"):
        config = preset(name)
        assert (config.network.augment_dim, config.training.augment, config.training.flip) == (9, 0.12, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shared", "millions", "giga"),
    [
        ("cifar10-dpm", [241.8, 107.5, 1.7], [39.66, 17.63, 0.28]),
        ("cifar10-edm", [125.3, 55.7, 0.9], [47.28, 21.02, 0.33]),
    ],
)
def test_separate_networks_differ_from_the_published_in_sharing_only(
    shared: str, millions: list[float], giga: list[float]
) -> None:
    config = preset(f"{shared}-separate")
    network = dataclasses.replace(config.network, separate=False)
    assert dataclasses.replace(config, name=shared, network=network) == preset(shared)
    cost = network_cost(config.network, 32, 32)
    assert cost.shared_parameters == 0
    # The middle one is the published baseline of one stage.
    assert [s.parameters / 1e6 for s in cost.stages] == pytest.approx(millions, abs=0.06)
    assert [s.multiply_adds / 1e9 for s in cost.stages] == pytest.approx(giga, abs=0.006)


@pytest.mark.slow
def test_the_meme_experts_cost_what_table_5_says() -> None:
    config = preset("cifar10-meme")
    network, training = config.network, config.training
    cost = network_cost(network, 32, 32)
    lengths = [1, 1, 1, 1]  # of the intervals of t
    assert weighted_multiply_adds(cost, lengths) / 1e9 == pytest.approx(13.08, rel=5e-3)
    # 7.85 PF of training: a forward pass of one image for every iteration
    assert training.steps * weighted_multiply_adds(cost, lengths) / 1e15 == pytest.approx(7.85, rel=5e-3)
    assert network.separate
    assert network.attention_shares is not None
    assert list(network.attention_shares) == [
        (k + 0.5) / 4 for k in range(4)
    ]  # more attention where there is more noise
    multistage = preset("cifar10-dpm")
    assert dataclasses.replace(training, steps=250_000, soft_intervals=0.0) == multistage.training
    assert (config.optimizer, config.diffusion, config.sampling) == (
        multistage.optimizer,
        multistage.diffusion,
        multistage.sampling,
    )
    assert training.soft_intervals == (0.2, 0.6, 0.8, 0.9)


def test_the_ldm_networks_see_latents_of_large_images() -> None:
    for name in LDM:
        config = preset(name)
        assert (config.data.shape, config.input_shape) == ((3, 256, 256), (3, 64, 64))
        assert (config.codec.source, config.codec.subfolder) == ("hf:CompVis/ldm-celebahq-256", "vqvae")
        assert config.codec.scale == 1.0


def test_the_ldm_networks_are_cut_at_steps() -> None:
    for name in LDM:
        config = preset(name)
        edges = [config.diffusion.schedule.edge_time(sigma) for sigma in config.stages.interior]
        assert edges == ([] if name == "celebahq-ldm-one-stage" else [442, 631])
        attends = (True, False, False)[: len(config.stages)]
        assert config.network.decoder_attention == attends
        assert config.network.head_channels == 32
        assert 0.5 ** (config.training.batch / config.training.ema_halflife) == pytest.approx(0.9999, abs=1e-7)


def test_calls_per_stage() -> None:
    assert calls_per_stage(preset("cifar10-dpm")) == [12, 2, 6]
    assert calls_per_stage(preset("celebahq-ldm")) == [8, 4, 8]  # by which Table 8 averages
    assert calls_per_stage(preset("cifar10-edm-one-stage")) == [35]


def test_widths_are_those_of_the_rows() -> None:
    def widths(network: NetworkConfig) -> tuple[int, ...]:
        return (network.encoder_width, *network.decoder_widths)

    assert widths(preset("cifar10-dpm-table7-3").network) == (192, 144, 112, 16)
    assert widths(preset("cifar10-dpm-five-stages").network) == (64, 224, 160, 160, 64, 48)
    assert widths(preset("celebahq-ldm").network) == (224, 256, 192, 128)
