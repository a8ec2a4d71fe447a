"""What every family has: checks of the common settings, and defaults for what a family does not say."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import nn

from multistage_diffusion.config.network import FAMILIES, NetworkConfig
from multistage_diffusion.errors import UserError

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"channels": 0}, "network.channels=0"),
    ({"channels": 10_001}, "network.channels 10001 is more than 10000, the most that is built"),
    ({"encoder_width": 0}, "network.encoder_width: width 0 must be positive, such as 64"),
    ({"decoder_widths": (8, -8)}, "network.decoder_widths=[8, -8]: width -8 must be positive"),
    ({"encoder_width": 100_001}, "width 100001 is more than 100000"),
    ({"decoder_widths": ()}, "network.decoder_widths"),
    ({"decoder_widths": (8,) * 1001}, "stages 1001 is more than 1000"),
    ({"dropout": 1.0}, "network.dropout=1.0"),
    ({"num_classes": -1}, "network.num_classes=-1"),
    ({"augment_dim": -1}, "network.augment_dim=-1"),
    (
        {"decoder_widths": (8, 8), "tempers": (1.0,)},
        "network.tempers=[1.0] needs one value for each of the 2 stages, such as [1.0, 1.0]",
    ),
]


@dataclass(frozen=True, kw_only=True)
class Plain(NetworkConfig):
    """A family that says as little as it may, with a setting for each stage and one that shapes tell."""

    per_stage: ClassVar[tuple[str, ...]] = (*NetworkConfig.per_stage, "tempers")
    in_shapes: ClassVar[tuple[str, ...]] = ("depth",)

    tempers: tuple[float, ...] | None = None
    depth: int = 2
    slope: float = 0.1

    def encoder(self, stage: int, width: int) -> nn.Module:
        return nn.Identity()

    def decoder(self, stage: int, encoder_width: int) -> nn.Module:
        return nn.Identity()


@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[str(b)[:60] for b, _ in REFUSED])
def test_refused_values_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Plain(**bad)
    assert message in str(error.value)


def test_a_width_that_is_not_built_is_not_checked() -> None:
    Plain(encoder_width=0, separate=True)


def test_a_family_that_says_nothing_has_defaults_that_hold() -> None:
    config = Plain()
    assert config.multiple == 1
    config.require_size(1, 1)
    assert config.counted_layers(nn.Identity()) is None
    assert config.boxes(nn.Identity()) is None
    assert config.elements(8, 8) is None
    assert config.advice() == config.notes(0) == []


def test_sizes_that_would_be_padded_to_twice_their_sides_are_refused() -> None:
    class Coarse(Plain):
        multiple = 8

    Coarse().require_size(5, 1)
    with pytest.raises(UserError, match="sides that are multiples of 8, far more than sides of 4"):
        Coarse().require_size(4, 4)


def test_decoders_can_share_one_if_at_most_their_widths_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    config = Plain(decoder_widths=(8, 8), tempers=(1.0, 1.0))
    assert config.unshared is None
    assert dataclasses.replace(config, tempers=None).unshared is None
    assert dataclasses.replace(config, tempers=(1.0, 2.0)).unshared == "tempers"
    narrower = dataclasses.replace(config, decoder_widths=(8, 4))
    assert narrower.unshared == "decoder_widths"
    monkeypatch.setattr(type(config), "resizable", True)
    assert narrower.unshared is None
    assert dataclasses.replace(narrower, tempers=(1.0, 2.0)).unshared == "tempers"
    assert dataclasses.replace(narrower, separate=True).unshared == "decoder_widths"


def test_one_decoder_alone_keeps_its_own_settings() -> None:
    config = Plain(decoder_widths=(8, 4), tempers=(1.0, 2.0), slope=0.5)
    assert config.single_stage(1, 6) == dataclasses.replace(config, decoder_widths=(6,), tempers=(2.0,))
    assert dataclasses.replace(config, tempers=None).single_stage(0, 6).tempers is None  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="width 0"):
        config.single_stage(0, 0)


def test_own_settings_that_shapes_do_not_tell_have_a_meaning_for_weights() -> None:
    assert Plain(slope=0.5).functional_settings() == {"network.family": "", "network.slope": 0.5}


def test_a_family_is_found_by_name_and_knows_it() -> None:
    for family in FAMILIES:
        assert FAMILIES[family].family == family
    assert NetworkConfig.of("ddpmpp", encoder_width=16).family == "ddpmpp"
    assert NetworkConfig.of().family == "ncsnpp"
    with pytest.raises(UserError, match=r"network.family='unet' must be one of ddpmpp, dit, ldm, meme, ncsnpp, uvit"):
        NetworkConfig.of("unet")
