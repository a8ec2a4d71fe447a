from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.errors import UserError
from multistage_diffusion.nets import MultiDecoderNetwork, build_network
from multistage_diffusion.nets import network as network_module

UNETS = ["ncsnpp", "ddpmpp", "ldm"]
TRANSFORMERS = ["dit", "uvit"]
FAMILIES = UNETS + TRANSFORMERS


def small(family: str, **changes: Any) -> NetworkConfig:
    base: dict[str, Any] = {
        "family": family,
        "channels": 2,
        "encoder_width": 8,
        "decoder_widths": (12, 8, 4),
        "num_classes": 4,
        "augment_dim": 3,
        "dropout": 0.0,
    }
    if family in TRANSFORMERS:
        depths = {} if changes.get("separate") or "decoder_widths" in changes else {"decoder_depths": (1, 3, 2)}
        base |= {"patch": 4, "encoder_depth": 2, "head_channels": 4, "size": (8, 8), **depths}
    else:
        base |= {"channel_mult": (1, 2, 2), "blocks_per_level": 1, "attention_factors": (2,)}
    if family == "ldm":  # 32 groups everywhere
        base |= {"encoder_width": 32, "decoder_widths": (64, 32, 32), "head_channels": 16}
    return NetworkConfig.of(**base | changes)


def awake(config: NetworkConfig) -> MultiDecoderNetwork:
    """A float64 network with ordinary random weights: at initialisation, outputs are too near zero to test."""
    torch.manual_seed(0)
    network = build_network(config).double().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return network


def batch(rows: int, height: int = 8, width: int = 8) -> tuple[Tensor, Tensor, Conditioning]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, 2, height, width, dtype=torch.float64, generator=generator)
    noise = torch.randn(rows, dtype=torch.float64, generator=generator)
    labels = torch.arange(rows) % 5 - 1
    return x, noise, Conditioning(labels=labels, augment=torch.randn(rows, 3, generator=generator).double())


def gradients(network: MultiDecoderNetwork) -> dict[str, Tensor]:
    result = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    return result


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batch_equals_row_by_row_loop_with_gradients(family: str, separate: bool) -> None:
    network = awake(small(family, separate=separate))
    x, noise, cond = batch(5)
    counts = [2, 1, 2]
    x.requires_grad_()
    mixed = network(x, noise, counts, cond)
    target = torch.randn_like(mixed)
    (mixed * target).sum().backward()
    mixed_gradients, mixed_input = gradients(network), x.grad
    x.grad = None

    rows = []
    for i, stage in enumerate([0, 0, 1, 2, 2]):
        one = slice(i, i + 1)
        rows.append(network(x[one], noise[one], [int(k == stage) for k in range(3)], cond.rows(one)))
    (torch.cat(rows) * target).sum().backward()
    torch.testing.assert_close(mixed, torch.cat(rows))
    loop_gradients = gradients(network)
    assert loop_gradients.keys() == mixed_gradients.keys() == dict(network.named_parameters()).keys()
    for name, gradient in mixed_gradients.items():
        torch.testing.assert_close(gradient, loop_gradients[name])
    torch.testing.assert_close(mixed_input, x.grad)


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_without_rows_have_no_gradient(family: str, separate: bool) -> None:
    network = awake(small(family, separate=separate))
    x, noise, cond = batch(3)
    network(x, noise, [1, 0, 2], cond).sum().backward()
    parts = network.parts()
    idle = {"decoder.2", "encoder.2"} & parts.keys()
    for name, part in parts.items():
        expected = name in idle
        assert all((p.grad is None) == expected for p in part.parameters()), name


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_cover_all_parameters_once(family: str) -> None:
    shared, separate = build_network(small(family)), build_network(small(family, separate=True))
    assert list(shared.parts()) == ["encoder", "decoder.1", "decoder.2", "decoder.3"]
    assert sorted(separate.parts()) == [f"{side}.{k}" for side in ("decoder", "encoder") for k in (1, 2, 3)]
    for network in (shared, separate):
        ids = [id(p) for part in network.parts().values() for p in part.parameters()]
        assert sorted(ids) == sorted(id(p) for p in network.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_separate_stage_is_an_ordinary_network(family: str) -> None:
    network = awake(small(family, separate=True))
    x, noise, cond = batch(4)
    whole = network(x, noise, [1, 2, 1], cond)
    for stage, rows in enumerate([slice(0, 1), slice(1, 3), slice(3, 4)]):
        width = network.config.decoder_widths[stage]
        ordinary = build_network(small(family, encoder_width=width, decoder_widths=(width,))).double().eval()
        ordinary.encoders[0].load_state_dict(network.encoders[stage].state_dict())
        ordinary.decoders[0].load_state_dict(network.decoders[stage].state_dict())
        count = rows.stop - rows.start
        torch.testing.assert_close(ordinary(x[rows], noise[rows], [count], cond.rows(rows)), whole[rows])


@pytest.mark.parametrize("size", [(5, 7), (8, 12), (1, 3), (9, 4)])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_size_is_replicated_and_cropped(family: str, size: tuple[int, int]) -> None:
    network = awake(small(family))
    x, noise, cond = batch(3, *size)
    result = network(x, noise, [1, 1, 1], cond)
    assert result.shape == x.shape
    full = [-(-length // 4) * 4 for length in size]
    padded = F.pad(x, (0, full[1] - size[1], 0, full[0] - size[0]), mode="replicate")
    expected = network(padded, noise, [1, 1, 1], cond)[..., : size[0], : size[1]]
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", ["noise", "labels", "augment"])
def test_every_input_matters_to_its_row_only(family: str, what: str) -> None:
    network = awake(small(family))
    x, noise, cond = batch(3)
    before = network(x, noise, [1, 1, 1], cond)
    assert cond.labels is not None
    assert cond.augment is not None
    if what == "noise":
        noise = noise + torch.tensor([0.0, 0.5, 0.0])
    elif what == "labels":
        cond = replace(cond, labels=cond.labels + torch.tensor([0, 1, 0]))
    else:
        cond = replace(cond, augment=cond.augment + torch.tensor([[0.0], [0.5], [0.0]]))
    change = (network(x, noise, [1, 1, 1], cond) - before).abs().amax(dim=(1, 2, 3))
    assert change[1] > (1e-5 if family == "uvit" else 1e-3)  # the gains of its norms are small here
    torch.testing.assert_close(change[[0, 2]], torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_network_is_nearly_zero_and_float32(family: str) -> None:
    torch.manual_seed(0)
    network = build_network(small(family)).eval()
    x, noise, _ = batch(3)
    result = network(x.float(), noise, [1, 1, 1])  # float64 noise, as schedules give it, is welcome
    assert result.dtype == torch.float32
    if family in ("ldm", "dit"):
        assert not result.any()
    elif family == "uvit":  # as published
        assert 0.01 < float(result.detach().std()) < 1
    else:
        assert 0 < float(result.detach().abs().max()) < 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_only_in_training(family: str) -> None:
    network = awake(small(family, dropout=0.5))
    x, noise, cond = batch(3)
    counts = [1, 1, 1]
    assert torch.equal(network(x, noise, counts, cond), network(x, noise, counts, cond))
    network.train()
    assert not torch.equal(network(x, noise, counts, cond), network(x, noise, counts, cond))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_bfloat16_is_near_full_precision(family: str) -> None:
    network = awake(small(family)).float()
    x, noise, cond = batch(3)
    cond = Conditioning(labels=cond.labels)
    full = network(x.float(), noise.float(), [1, 1, 1], cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = network(x.float(), noise.float(), [1, 1, 1], cond)
    half.float().square().mean().backward()
    assert half.dtype == torch.bfloat16
    assert float((half - full).detach().norm() / full.detach().norm()) < 0.05
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in network.decoders.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_channels_last_gives_the_same(family: str) -> None:
    network = awake(small(family))
    x, noise, cond = batch(3)
    expected = network(x, noise, [1, 1, 1], cond)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(network(x.to(memory_format=torch.channels_last), noise, [1, 1, 1], cond), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_state_dict_round_trip(family: str) -> None:
    network = awake(small(family))
    other = build_network(small(family)).double().eval()
    state = network.state_dict()
    assert state.keys() == dict(network.named_parameters()).keys()  # filters are not weights
    other.load_state_dict(state)
    x, noise, cond = batch(3)
    assert torch.equal(other(x, noise, [1, 0, 2], cond), network(x, noise, [1, 0, 2], cond))


@pytest.mark.parametrize("family", UNETS)
def test_one_level_without_asked_attention(family: str) -> None:
    network = awake(small(family, channel_mult=(1,), attention_factors=(), decoder_widths=(32,)))
    x, noise, cond = batch(2, 5, 3)
    assert network(x, noise, [2], cond).shape == x.shape
    attending = [name for name, _ in network.named_modules() if name.endswith("attention")]
    where = {"ncsnpp": "encoders.0.bottom", "ddpmpp": "decoders.0.bottom", "ldm": "encoders.0.middle"}[family]
    assert attending == [f"{where}.block0.attention"]


@pytest.mark.parametrize("counts", [[1, 1], [1, 1, 2], [4, -1, 0], [3, 0, 0, 0]])
def test_bad_counts(counts: list[int]) -> None:
    x, noise, _ = batch(3)
    with pytest.raises(ValueError, match="counts="):
        build_network(small("ddpmpp")).double()(x, noise, counts)


def test_bad_shapes() -> None:
    network = build_network(small("ddpmpp")).double()
    x, noise, _ = batch(3)
    with pytest.raises(ValueError, match="noise has shape"):
        network(x, noise[:1], [1, 1, 1])
    with pytest.raises(ValueError, match="x has shape"):
        network(x[:, :1], noise, [1, 1, 1])
    with pytest.raises(ValueError, match="at least 1"):
        network(x[:0], noise[:0], [0, 0, 0])


@pytest.mark.parametrize("family", ["ncsnpp", "ddpmpp"])
@pytest.mark.parametrize("most", [16, 32])
def test_every_group_norm_follows_the_setting(family: str, most: int) -> None:
    config = NetworkConfig.of(
        family=family,  # type: ignore[arg-type]
        encoder_width=64,
        decoder_widths=(128, 32),
        channel_mult=(1, 2),
        blocks_per_level=1,
        norm_groups=most,
    )
    with torch.device("meta"):
        norms = [m for m in build_network(config).modules() if isinstance(m, torch.nn.GroupNorm)]
    assert {n.num_groups for n in norms} == {min(n.num_channels // 4, most) for n in norms}
    assert max(n.num_groups for n in norms) == most


@pytest.mark.parametrize(
    ("family", "settings", "tensor"),
    [
        ("dit", {"size": (100_000, 100_000)}, r"encoders.0.positions, is \[1, 2500000000, 64\]"),
        ("uvit", {"size": (100_000, 100_000)}, r"encoders.0.positions, is \[1, 2500000000, 64\]"),
        ("uvit", {"patch": 1000, "encoder_width": 64_000}, r"encoders.0.patches.linear.weight, is \[64000, 3000000\]"),
        ("ncsnpp", {"encoder_width": 99_200}, r"is \[198400, 198400, 3, 3\]"),
    ],
)
def test_memory_is_checked_before_a_network_is_built(family: str, settings: dict[str, Any], tensor: str) -> None:
    config = NetworkConfig.of(family, **{"encoder_width": 64, "decoder_widths": (64,), **settings})
    with pytest.raises(
        UserError, match=rf"network.family='{family}', whose largest tensor, .*{tensor}, needs at least"
    ):
        build_network(config)


def test_counting_a_network_leaves_its_weights_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    config, states = NetworkConfig.of("dit", encoder_width=64, decoder_widths=(64,), num_classes=3), []
    for least in (1, 10**9):
        monkeypatch.setattr(network_module, "COUNTED", least)
        torch.manual_seed(0)
        states.append(build_network(config).state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
