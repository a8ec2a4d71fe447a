"""A wider decoder computes what the trained one does; narrowed again, it is the trained one, and a slice of the wider."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.network import MultiDecoderNetwork
from multistage_diffusion.training.resizing import resized, slices


def network(family: str, width: int, seed: int, **changes: object) -> MultiDecoderNetwork:
    """Return a network of one decoder with random weights, in float64."""
    torch.manual_seed(seed)
    settings = {"channels": 2, "encoder_width": 8, "channel_mult": (1, 2), "blocks_per_level": 1, "dropout": 0.0}
    made = build_network(NetworkConfig.of(family, **{**settings, "decoder_widths": (width,), **changes})).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    return made.eval()


def output(made: MultiDecoderNetwork) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(5)
    x = torch.randn(3, 2, 8, 8, generator=drawn, dtype=torch.float64)
    with torch.no_grad():
        return made(x, torch.tensor([0.1, 0.7, 2.0], dtype=torch.float64), (3,), Conditioning())


def started(given: MultiDecoderNetwork, target: MultiDecoderNetwork) -> MultiDecoderNetwork:
    """Return `target` with the encoder of `given`, and with its decoder at another width."""
    (before,), (after,) = given.config.decoder_widths, target.config.decoder_widths
    weights = resized(given.decoders[0], target.decoders[0], before, after)
    assert weights is not None
    target.encoders[0].load_state_dict(given.encoders[0].state_dict())
    target.decoders[0].load_state_dict(weights)
    return target


@pytest.mark.parametrize("family", ["ncsnpp", "ddpmpp"])
@pytest.mark.parametrize(("before", "after"), [(8, 12), (4, 8), (12, 20), (16, 24)])
@pytest.mark.parametrize("attention", [(1, 2), (2,)])
def test_a_wider_decoder_starts_with_the_same_output(
    family: str, before: int, after: int, attention: tuple[int, ...]
) -> None:
    given = network(family, before, 1, attention_factors=attention)
    wider = started(given, network(family, after, 2, attention_factors=attention))
    torch.testing.assert_close(output(wider), output(given), rtol=1e-10, atol=1e-12)
    with torch.no_grad():  # the new channels can learn: their weights are not zero
        new = wider.decoders[0].state_dict()["levels.1.blocks.0.conv0.weight"][before:]
    assert bool((new != 0).all())


@pytest.mark.parametrize("changes", [{"head_channels": 4}, {"head_channels": None, "scale_shift": True}])
def test_a_wider_latent_network_starts_with_the_same_output(changes: dict[str, object]) -> None:
    common = {"attention_factors": (1, 2), "encoder_width": 8, "group_count": 1, **changes}
    given, wider = network("ldm", 8, 1, **common), network("ldm", 12, 2, **common)
    for made in (given, wider):
        for module in made.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = module.num_channels // 4  # as many channels per group at both widths
    torch.testing.assert_close(output(started(given, wider)), output(given), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("family", ["ncsnpp", "ddpmpp", "ldm"])
@pytest.mark.parametrize(("narrow", "wide"), [(8, 12), (4, 12), (8, 24)])
def test_a_decoder_that_is_widened_and_narrowed_is_as_before(family: str, narrow: int, wide: int) -> None:
    changes = {"attention_factors": (1, 2)}
    if family == "ldm":
        changes |= {"encoder_width": 64, "head_channels": 32}
        narrow, wide = 8 * narrow, 8 * wide
    given = network(family, narrow, 1, **changes)
    wider = started(given, network(family, wide, 2, **changes))
    back = started(wider, network(family, narrow, 3, **changes))
    for name, value in given.state_dict().items():
        torch.testing.assert_close(back.state_dict()[name], value, rtol=1e-12, atol=0.0)


def test_a_slice_is_the_first_channels_of_the_decoder_and_all_of_the_encoders() -> None:
    given = network("ncsnpp", 16, 1, attention_factors=())
    narrow = started(given, network("ncsnpp", 4, 2, attention_factors=()))
    old, new = (made.decoders[0].state_dict() for made in (given, narrow))
    # the second block of the last level reads [h, skip]: 16 or 4 channels of h, and 8 of the encoder's
    name = "levels.1.blocks.1.conv0.weight"
    assert torch.equal(new[name], old[name][:4, [0, 1, 2, 3, *range(16, 24)]])
    assert torch.equal(new["conv_out.weight"], old["conv_out.weight"][:, :4])


@pytest.mark.parametrize(
    "changes", [{"attention_factors": ()}, {"blocks_per_level": 2}, {"channel_mult": (1, 1)}, {"channel_mult": (1, 3)}]
)
def test_decoders_that_differ_in_more_than_width_are_not_resized(changes: dict[str, object]) -> None:
    given = network("ddpmpp", 8, 1, attention_factors=(2,))
    other = network("ddpmpp", 12, 2, **{"attention_factors": (2,), **changes})
    assert resized(given.decoders[0], other.decoders[0], 8, 12) is None
    # a block with as many inputs as outputs has no projection that could hold the trained one
    assert resized(given.decoders[0], network("ddpmpp", 16, 2, attention_factors=(2,)).decoders[0], 8, 16) is None
    assert resized(nn.Linear(2, 3), nn.Linear(2, 4), 8, 12) is None
    assert slices(given.decoders[0], other.decoders[0], 8, 12) is None
    assert slices(other.decoders[0], given.decoders[0], 12, 8) is None
    assert slices(network("ddpmpp", 16, 2, attention_factors=(2,)).decoders[0], given.decoders[0], 16, 8) is None
    assert slices(nn.Linear(2, 4), nn.Linear(2, 3), 12, 8) is None


@pytest.mark.parametrize(
    ("family", "wide", "narrow", "changes"),
    [
        ("ncsnpp", 20, 4, {"attention_factors": (1, 2)}),
        ("ddpmpp", 24, 8, {"attention_factors": (2,)}),
        ("ldm", 12, 8, {"attention_factors": (1, 2), "group_count": 1, "head_channels": 4}),
        ("ldm", 12, 8, {"attention_factors": (1, 2), "group_count": 1, "head_channels": None, "scale_shift": True}),
    ],
)
def test_a_slice_is_what_a_narrower_decoder_starts_from_but_for_the_scale_of_queries(
    family: str, wide: int, narrow: int, changes: dict[str, object]
) -> None:
    given, small = (network(family, width, 1, **changes).decoders[0] for width in (wide, narrow))
    started_from, found = resized(given, small, wide, narrow), slices(given, small, wide, narrow)
    assert started_from is not None
    assert found is not None
    values = given.state_dict()
    scaled = 0
    for name, value in started_from.items():
        own = torch.full_like(value, torch.nan)
        for here, there in found[name]:
            own[here] = values[name][there]
        if ".qkv." in name and changes.get("head_channels") is None and own.shape != values[name].shape:
            own[: len(own) // 3] *= (narrow / wide) ** 0.5
            scaled += 1
        torch.testing.assert_close(own, value, rtol=1e-12, atol=0.0)
    assert (scaled > 0) == (changes.get("head_channels") is None)
