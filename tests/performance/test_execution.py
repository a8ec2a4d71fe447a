from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.nets import build_network
from multistage_diffusion.nets.network import MultiDecoderNetwork
from multistage_diffusion.performance import execution
from multistage_diffusion.performance.execution import Execution, Graphs, execute

COUNTS = [2, 1, 3]
FAMILIES = {
    "ncsnpp": {},
    "ddpmpp": {},
    "ldm": {"head_channels": 16, "encoder_width": 32, "decoder_widths": (64, 32, 32)},
    "meme": {"separate": True, "decoder_widths": (16, 16, 16), "attention_shares": (1.0, 0.5, 0.0)},
}
TRANSFORMERS = {
    family: {"encoder_depth": 2, "decoder_depths": (1, 2, 3), "head_channels": 4} for family in ("dit", "uvit")
}


def network(family: str, channels: int = 1, **changes: object) -> MultiDecoderNetwork:
    """Return a small network in float64 none of whose layers starts at zero."""
    settings = {
        "family": family,
        "channels": channels,
        "encoder_width": 16,
        "decoder_widths": (24, 16, 8),
        "dropout": 0.0,
        **({"channel_mult": (1, 2), "blocks_per_level": 1, "attention_factors": (2,)} if family in FAMILIES else {}),
        **(FAMILIES | TRANSFORMERS)[family],
        **changes,
    }
    torch.manual_seed(0)
    built = build_network(NetworkConfig.of(**settings)).double()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return built


def inputs(channels: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(COUNTS), channels, size, size, dtype=torch.float64, generator=generator)
    return x, torch.rand(sum(COUNTS), dtype=torch.float64, generator=generator)


def gradients(net: MultiDecoderNetwork, channels: int = 1) -> list[Tensor]:
    out = net(*inputs(channels), COUNTS)
    return [out, *torch.autograd.grad(out.square().sum(), list(net.parameters()))]


def test_words() -> None:
    assert Execution().words() == "plain"
    assert Execution(channels_last=True, cuda_graphs=True).words() == "channels last, cuda graphs"
    assert Execution(recompute=True, thread_parallel=2).words() == "recompute, 2 threads"


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_channels_last_reaches_every_convolution_and_changes_nothing(family: str, channels: int) -> None:
    net = network(family, channels)
    plain = gradients(net, channels)
    execute(net, Execution(channels_last=True))
    odd: list[str] = []

    def look(name: str):
        def hook(_: nn.Module, __: object, out: Tensor) -> None:
            if not out.is_contiguous(memory_format=torch.channels_last):
                odd.append(name)

        return hook

    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.GroupNorm) and "mixer" not in name:
            module.register_forward_hook(look(name))
    laid_out = gradients(net, channels)
    assert not odd
    for a, b in zip(plain, laid_out, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    execute(net, Execution())
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(net, channels), strict=True))


@pytest.mark.parametrize("family", [*FAMILIES, *TRANSFORMERS])
def test_recomputing_changes_nothing(family: str) -> None:
    net = network(family, dropout=0.5).train()
    found, kept = [], []
    for recompute in (False, True):
        execute(net, Execution(recompute=recompute))
        torch.manual_seed(3)
        maps: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, m=maps: (m.update({t.data_ptr(): t.nbytes}), t)[1], lambda t: t
        ):
            found.append(gradients(net))
        kept.append(sum(maps.values()))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert kept[1] < 0.8 * kept[0]  # weights, which are kept anyway, are many in so small a network


@pytest.mark.slow
def test_compiled_blocks_compute_the_same_and_leave_the_tensors_names_alone() -> None:
    few = {"channel_mult": (1,), "attention_factors": (), "decoder_widths": (16, 16, 16)}  # shapes: each takes a while
    net = network("ddpmpp", **few)
    names, plain = list(net.state_dict()), gradients(net)
    execute(net, Execution(compile=True, channels_last=True))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for a, b in zip(plain, gradients(net), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3  # they were compiled
    assert list(net.state_dict()) == names
    for a, b in zip(plain, gradients(copy.deepcopy(net)), strict=True):  # as stages that part are
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    execute(net, Execution())
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(net), strict=True))


def test_graphs_are_recorded_once_for_each_kind_of_call(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[bool] = []
    for name, learns in (("_recorded", False), ("_recorded_with_gradients", True)):

        def record(call, inputs, learns=learns):
            recorded.append(learns)
            return call

        monkeypatch.setattr(execution, name, record)
    net = network("ddpmpp", num_classes=4, augment_dim=3)
    graphs, (x, noise) = Graphs(net), inputs()
    cond = Conditioning(labels=torch.tensor([0, 1, 2, 3, -1, 0]), augment=torch.rand(6, 3, dtype=torch.float64))
    for given in (None, cond, Conditioning(labels=cond.labels), Conditioning(augment=cond.augment)):
        for _ in range(2):
            assert torch.equal(graphs(x, noise, COUNTS, given), net(x, noise, COUNTS, given))
    assert recorded == [True] * 4
    with torch.no_grad():
        for counts in (COUNTS, [6, 0, 0], COUNTS):
            assert torch.equal(graphs(x, noise, counts), net(x, noise, counts))
    assert recorded == [True] * 4 + [False] * 2
    net.eval()
    graphs(x, noise, COUNTS)
    graphs(x[:5], noise[:5], [5, 0, 0])
    assert recorded[6:] == [True] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_compute_what_the_network_does() -> None:
    net = network("ncsnpp").cuda()
    graphs, (x, noise) = Graphs(net), (tensor.cuda() for tensor in inputs())
    for counts in (COUNTS, [6, 0, 0]):
        for scale in (1.0, 2.0):
            with torch.no_grad():
                torch.testing.assert_close(graphs(scale * x, noise, counts), net(scale * x, noise, counts))
            found = []
            for call in (net, graphs):
                net.zero_grad()
                call(scale * x, noise, counts).square().sum().backward()
                found.append([None if p.grad is None else p.grad.clone() for p in net.parameters()])
            for a, b in zip(*found, strict=True):
                assert (a is None) == (b is None)
                if a is not None:
                    torch.testing.assert_close(a, b)
