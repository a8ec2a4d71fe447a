"""Published names to ours and back."""

import pytest
import torch
from foreign_files import FAMILIES, golden, one_stage

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.interop.names import convert_published, dotless, is_buffer, published_names, restore_published
from multistage_diffusion.interop.shapes import network_of
from multistage_diffusion.nets import build_network

SMALL = {"ncsnpp": (16, 16), "ddpmpp": (16, 16), "ldm": (8, 8)}


def small(family: str, decoders: tuple[int, ...], **changes: object) -> NetworkConfig:
    width = 32 if family == "ldm" else 8
    settings = {"channel_mult": (1, 2), "blocks_per_level": 1, "attention_factors": (2,), **changes}
    widths = tuple(width * d for d in decoders)
    return NetworkConfig.of(family=family, encoder_width=width, decoder_widths=widths, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("family", SMALL)
# a decoder twice as wide as the encoder has a block without a 1x1 skip at its bottom
@pytest.mark.parametrize("decoders", [(1,), (2,), (2, 1, 3)], ids=str)
def test_every_parameter_has_a_published_name_and_comes_back(family: str, decoders: tuple[int, ...]) -> None:
    config = small(family, decoders)
    network, names = build_network(config), published_names(config, SMALL[family])
    state = {name: torch.randn_like(value) for name, value in network.state_dict().items()}
    published = restore_published(state, names)
    assert list(published) == list(names)
    back = convert_published(published, names)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_names_of_one_stage_are_those_of_the_family_s_own_code(name: str) -> None:
    _, weights, _ = golden(name)
    alone = {key: value for key, value in one_stage(name, weights).items() if not is_buffer(key)}
    config = network_of(FAMILIES[name], alone, head_channels=16)  # type: ignore[arg-type]
    assert set(published_names(config, (16, 16))) == set(alone)


def test_class_and_augmentation_layers_have_edm_s_names() -> None:
    config = small("ddpmpp", (1,), num_classes=10, augment_dim=9)
    names = published_names(config, (16, 16))
    assert names["model.map_label.weight"].name == "encoders.0.embedding.label.weight"
    assert names["model.map_augment.weight"].name == "encoders.0.embedding.augment.weight"
    assert "model.map_augment.bias" not in names


def test_names_of_an_edm_network_carry_the_resolution_of_every_level() -> None:
    names = published_names(small("ddpmpp", (1, 1)), (28, 28))
    assert {name.split(".")[2].split("_")[0] for name in names if ".enc." in name} == {"28x28", "14x14"}


@pytest.mark.parametrize(
    ("config", "size", "word"),
    [
        (small("ncsnpp", (1, 2), separate=True), (8, 8), "network.separate=True"),
        (small("ncsnpp", (1,), num_classes=3), (8, 8), "network.num_classes=3"),
        (small("ldm", (1,), augment_dim=9), (8, 8), "network.augment_dim=9"),
        (small("ddpmpp", (1,)), (8, 16), "size=8 x 16"),
        (small("ddpmpp", (1,)), (9, 9), "size=9 x 9"),
    ],
)
def test_a_network_without_a_published_layout_is_named(config: NetworkConfig, size: tuple[int, int], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        published_names(config, size)


def test_the_average_of_latent_diffusion_drops_the_dots() -> None:
    assert dotless("input_blocks.0.0.weight") == "diffusion_modelinput_blocks00weight"
