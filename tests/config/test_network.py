"""Networks that cannot be built are refused, naming field and value, and only those."""

from __future__ import annotations

import dataclasses
import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from multistage_diffusion.config.network import NetworkConfig, group_count
from multistage_diffusion.nets import build_network

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"channels": 0}, "network.channels=0"),
    ({"decoder_widths": ()}, "network.decoder_widths"),
    ({"channel_mult": (), "attention_factors": ()}, "network.channel_mult"),
    ({"channel_mult": (1, 0)}, "network.channel_mult=[1, 0]"),
    ({"channel_mult": (1, -2)}, "network.channel_mult=[1, -2]"),
    ({"blocks_per_level": 0}, "network.blocks_per_level=0"),
    ({"dropout": 1.0}, "network.dropout=1.0"),
    ({"num_classes": -1}, "network.num_classes=-1"),
    ({"augment_dim": -1}, "network.augment_dim=-1"),
    ({"attention_factors": (3,)}, "attention_factors=[3]: 3 is not a level's downsample factor (1, 2"),
    ({"attention_factors": (16,)}, "16 is not"),
    ({"encoder_width": 2}, "width 2 must be even and at least 4"),
    ({"decoder_widths": (64, 33)}, "width 33 must be even"),
    ({"encoder_width": 18}, "width 18 x 1 = 18 channels is not divisible into 4 groups"),
    ({"decoder_widths": (68,)}, "use a multiple of 16"),
    ({"encoder_width": 40, "decoder_widths": (28,)}, "meet in 68 channels, not divisible into 16"),
    ({"encoder_width": 18, "channel_mult": (2,), "attention_factors": ()}, "width 18 x 1 = 18 channels"),
    ({"head_channels": 16}, "network.head_channels=16 is a setting of network.family=ldm only; leave"),
    ({"family": "ddpmpp", "decoder_attention": (True,)}, "network.decoder_attention=[True] is a setting"),
    ({"family": "ldm", "head_channels": 0}, "network.head_channels=0 must be positive"),
    ({"family": "ldm", "head_channels": 48}, "network.head_channels=48 does not divide 256 channels"),
    (
        {"family": "ldm", "head_channels": 64, "decoder_widths": (96,), "channel_mult": (1, 2, 3), "attention_factors": (4,)},
        "network.head_channels=64 does not divide 288 channels that attend; use 32",
    ),
    ({"family": "ldm", "decoder_attention": (True, False)}, "decoder_attention=[True, False] needs true"),
    ({"family": "ldm", "decoder_attention": ()}, "network.decoder_attention=[] needs true or false for each"),
    ({"attention_shares": (0.5,)}, "network.attention_shares=[0.5] is a setting of network.family=meme only; leave it out"),
    ({"family": "ldm", "attention_shares": (0.5,)}, "network.attention_shares=[0.5] is a setting"),
    ({"family": "meme", "attention_shares": (0.5,), "head_channels": 16}, "network.head_channels=16 is a setting"),
    ({"family": "meme"}, "network.attention_shares=None needs a number in [0, 1] for each of the 1 stages"),
    ({"family": "meme", "attention_shares": (0.5, 0.5)}, "network.attention_shares=[0.5, 0.5] needs a number"),
    ({"family": "meme", "attention_shares": (1.5,)}, "network.attention_shares=[1.5] needs a number in [0, 1]"),
    ({"family": "meme", "attention_shares": (-0.5,)}, "network.attention_shares=[-0.5] needs a number in [0, 1]"),
    ({"family": "meme", "attention_shares": (math.nan,)}, "network.attention_shares=[nan] needs a number"),
    (
        {"family": "meme", "decoder_widths": (64, 64), "attention_shares": (0.2, 0.8)},
        "network.separate=False: the 2 experts of network.family=meme share nothing; set it to true",
    ),
    ({"norm_groups": 0}, "network.norm_groups=0 must be positive"),
    ({"family": "ldm", "norm_groups": 16, "decoder_widths": (48,)}, "is not divisible into 32 groups"),
    ({"family": "ldm", "norm_groups": 32}, "network.norm_groups=32 is a setting of network.family=ncsnpp and ddpmpp only"),
    ({"norm_groups": 32, "decoder_widths": (144,)}, "into 32 groups for GroupNorm; use a multiple of 32"),
    ({"family": "ldm", "encoder_width": 48}, "48 x 1 = 48 channels is not divisible into 32 groups"),
    ({"family": "ldm", "decoder_widths": (80,)}, "GroupNorm; use a multiple of 32"),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), REFUSED, ids=[str(b) for b, _ in REFUSED])
def test_refused_values_are_named(bad: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        NetworkConfig(**bad)
    assert message in str(error.value)


@pytest.mark.parametrize(("channels", "groups"), [(4, 1), (16, 4), (60, 15), (64, 16), (68, 16), (256, 16)])
def test_group_count(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


@pytest.mark.parametrize("width", [16, 64, 112, 144, 160, 192, 208, 224])
def test_every_width_of_the_paper_is_accepted(width: int) -> None:
    NetworkConfig(encoder_width=width, decoder_widths=(width,))


def test_just_the_widths_that_no_network_can_have_are_refused() -> None:
    rng = random.Random(4)
    outcomes: set[tuple[str, bool]] = set()
    for _ in range(80):
        family = rng.choice(["ncsnpp", "ddpmpp", "ldm", "meme"])
        choice: dict[str, Any] = {
            "family": family,
            "encoder_width": rng.choice([6, 12, 20, 36, 40, 48, 64]),
            "decoder_widths": (rng.choice([6, 12, 20, 28, 48, 64]),),
            "channel_mult": rng.choice([(1,), (2,), (1, 2), (2, 1), (1, 3)]),
            "blocks_per_level": rng.choice([1, 2]),
            "attention_factors": (1,) if family == "meme" else (),
            "attention_shares": (rng.choice([0.0, 0.1, 0.5, 1.0]),) if family == "meme" else None,
            "separate": rng.random() < 0.2,
            "norm_groups": rng.choice([6, 16, 32]) if family in ("ncsnpp", "ddpmpp") else 16,
        }
        try:
            NetworkConfig(**choice)
            refused = False
        except ValueError:
            refused = True
        unchecked = SimpleNamespace(**{**dataclasses.asdict(NetworkConfig()), **choice})
        try:
            with torch.device("meta"):
                build_network(unchecked)  # type: ignore[arg-type]
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
            NetworkConfig(encoder_width=candidate, decoder_widths=(candidate,), channel_mult=(1, 2, 3, 5))
        except ValueError as error:
            return str(error)
        return ""

    for _ in range(2):  # a small width may be refused once more, at a deeper level
        message = refusal(width)
        if message:
            multiple = int(message.rsplit(" ", 1)[1])
            width = -(-width // multiple) * multiple
    assert refusal(width) == ""
