from __future__ import annotations

import pytest

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.description import calls_per_stage
from multistage_diffusion.nets.cost import network_cost
from multistage_diffusion.paper_presets import PAPER_PRESETS
from multistage_diffusion.presets import PRESETS, preset
from multistage_diffusion.schedules import VP

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
        ("cifar10-edm", [0.442, 0.636]),
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


def test_the_edm_networks_have_their_known_sizes() -> None:
    cost = network_cost(preset("cifar10-edm").network, 32, 32)
    assert cost.shared_parameters / 1e6 == pytest.approx(19.6, abs=0.05)
    assert [s.parameters / 1e6 for s in cost.stages] == pytest.approx([87.9, 55.7, 24.4], abs=0.05)
    assert [s.multiply_adds / 1e9 for s in cost.stages] == pytest.approx([35.56, 21.02, 7.58], abs=0.005)
    # The baseline is the middle stage alone: the published EDM network for CIFAR-10 has 55.7 M parameters.
    assert network_cost(preset("cifar10-edm-one-stage").network, 32, 32).total_parameters == cost.stages[1].parameters


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
