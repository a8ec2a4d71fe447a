"""U-Nets that cannot be built are refused, naming field and value, and only those."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from multistage_diffusion.config.network import FAMILIES, NetworkConfig
from multistage_diffusion.nets import build_network

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"channel_mult": (), "attention_factors": ()}, "network.channel_mult"),
    ({"channel_mult": (1, 0)}, "network.channel_mult=[1, 0]"),
    ({"channel_mult": (1, -2)}, "network.channel_mult=[1, -2]"),
    ({"blocks_per_level": 0}, "network.blocks_per_level=0"),
    ({"attention_factors": (3,)}, "attention_factors=[3]: 3 is not a level's downsample factor (1, 2"),
    ({"attention_factors": (16,)}, "16 is not"),
    ({"encoder_width": 2}, "width 2 must be even and at least 4"),
    ({"decoder_widths": (64, 33)}, "width 33 must be even"),
    ({"encoder_width": 18}, "width 18 x 1 = 18 channels is not divisible into 4 groups"),
    ({"decoder_widths": (68,)}, "use a multiple of 16"),
    ({"encoder_width": 40, "decoder_widths": (28,)}, "meet in 68 channels, not divisible into 16"),
    ({"encoder_width": 18, "channel_mult": (2,), "attention_factors": ()}, "width 18 x 1 = 18 channels"),
    ({"norm_groups": 0}, "network.norm_groups=0 must be positive"),
    ({"norm_groups": 32, "decoder_widths": (144,)}, "into 32 groups for GroupNorm; use a multiple of 32"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[str(b) for b, _ in REFUSED])
def test_refused_values_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        NetworkConfig.of(**bad)
    assert message in str(error.value)


@pytest.mark.parametrize("width", [16, 64, 112, 144, 160, 192, 208, 224])
def test_every_width_of_the_paper_is_accepted(width: int) -> None:
    NetworkConfig.of(encoder_width=width, decoder_widths=(width,))


def unchecked(family: str, settings: dict[str, Any]) -> NetworkConfig:
    """Settings that nothing has checked."""
    made = object.__new__(FAMILIES[family])
    for field in dataclasses.fields(made):
        if field.init:
            object.__setattr__(made, field.name, settings.get(field.name, field.default))
    return made


def test_just_the_widths_that_no_network_can_have_are_refused() -> None:
    rng = random.Random(4)
    outcomes: set[tuple[str, bool]] = set()
    for _ in range(80):
        family = rng.choice(["ncsnpp", "ddpmpp", "ldm", "meme"])
        choice: dict[str, Any] = {
            "encoder_width": rng.choice([6, 12, 20, 36, 40, 48, 64]),
            "decoder_widths": (rng.choice([6, 12, 20, 28, 48, 64]),),
            "channel_mult": rng.choice([(1,), (2,), (1, 2), (2, 1), (1, 3)]),
            "blocks_per_level": rng.choice([1, 2]),
            "attention_factors": (1,) if family == "meme" else (),
            "separate": rng.random() < 0.2,
        }
        if family == "meme":
            choice["attention_shares"] = (rng.choice([0.0, 0.1, 0.5, 1.0]),)
        elif family != "ldm":
            choice["norm_groups"] = rng.choice([6, 16, 32])
        try:
            NetworkConfig.of(family, **choice)
            refused = False
        except ValueError:
            refused = True
        try:
            with torch.device("meta"):
                build_network(unchecked(family, choice))
            impossible = False
        except ValueError:
            impossible = True
        assert refused == impossible, choice
        outcomes.add((family, refused))
    assert len(outcomes) == 8


@pytest.mark.parametrize("width", range(4, 140, 2))
def test_the_multiple_the_message_asks_for_is_accepted(width: int) -> None:
    def refusal(candidate: int) -> str:
        try:
            NetworkConfig.of(encoder_width=candidate, decoder_widths=(candidate,), channel_mult=(1, 2, 3, 5))
        except ValueError as error:
            return str(error)
        return ""

    for _ in range(2):  # a small width may be refused once more, at a deeper level
        message = refusal(width)
        if message:
            multiple = int(message.rsplit(" ", 1)[1])
            width = -(-width // multiple) * multiple
    assert refusal(width) == ""
