"""Layers for the CPU compute what PyTorch's do, and any network can be given them."""

from __future__ import annotations

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.performance.cpu import Dropout, PointwiseConv, dropout, masks_from, quicken


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.999999])
def test_dropout_zeroes_its_share_and_keeps_the_mean(probability: float) -> None:
    torch.manual_seed(0)
    x = torch.ones(64, 3, 41, 43, dtype=torch.float64, requires_grad=True)
    y = dropout(x, probability, training=True)
    expected = min(round(probability * 2**16), 2**16 - 1) / 2**16
    deviation = math.sqrt(expected * (1 - expected) / x.numel())
    assert abs(float((y == 0).double().mean()) - expected) < 4 * deviation
    torch.testing.assert_close(y[y != 0], torch.full_like(y[y != 0], 1 / (1 - expected)))
    y.sum().backward()
    assert torch.equal(x.grad, y)  # what is dropped learns nothing


def test_dropout_is_decided_by_the_seed_and_by_nothing_in_a_row() -> None:
    x = torch.ones(1, 1, 1, 100_001)
    torch.manual_seed(1)
    first, second = (dropout(x, 0.5, training=True).flatten() == 0 for _ in range(2))
    torch.manual_seed(1)
    assert torch.equal(dropout(x, 0.5, training=True).flatten() == 0, first)
    for one, other in ((first, second), (first[1:], first[:-1]), (first[4:], first[:-4])):
        assert abs(float((one == other).double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(len(one))


def test_nothing_is_dropped_without_training_or_probability() -> None:
    x = torch.randn(2, 3, 4, 4)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x


def test_masks_from_a_generator_are_drawn_from_it_in_this_thread_alone() -> None:
    x, drawn = torch.ones(1000), []
    own = torch.Generator()

    def mask() -> Tensor:
        return dropout(x, 0.5, training=True) == 0

    torch.manual_seed(1)
    first, second = mask(), mask()
    torch.manual_seed(1)
    with masks_from(own.manual_seed(5)):
        inside = mask()
        thread = threading.Thread(target=lambda: drawn.append(mask()))
        thread.start()
        thread.join()
        again = mask()
    assert torch.equal(drawn[0], first)  # another thread has torch's own
    assert torch.equal(mask(), second)  # of which nothing was drawn here
    assert not torch.equal(inside, first)
    assert not torch.equal(inside, again)
    with masks_from(own.manual_seed(5)):
        assert torch.equal(mask(), inside)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "sliced"])
def test_a_pointwise_convolution_is_the_convolution(layout: str) -> None:
    torch.manual_seed(0)
    layer = PointwiseConv(6, 10, 1).double()
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(3, 8, 5, 7, dtype=torch.float64)
    x = x[:, 1:7] if layout == "sliced" else x[:, :6].contiguous()
    x = x.to(memory_format=torch.channels_last) if layout == "channels last" else x
    x.requires_grad_()
    inputs = [x, layer.weight, layer.bias]
    expected, found = F.conv2d(*inputs), layer(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last) == (layout != "contiguous")
    grad = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_any_network_s_layers_are_replaced_and_keep_names_and_weights() -> None:
    torch.manual_seed(0)
    plain = nn.ModuleDict(
        {
            "point": nn.Conv2d(3, 4, 1),
            "strided": nn.Conv2d(3, 4, 1, stride=2),
            "wide": nn.Conv2d(3, 4, 3),
            "grouped": nn.Conv2d(4, 4, 1, groups=2),
            "bare": nn.Conv2d(3, 4, 1, bias=False),
            "drop": nn.Dropout(0.5),
        }
    )
    quick = quicken(copy.deepcopy(plain))
    kinds = {name: type(layer) for name, layer in quick.items() if type(layer) is not type(plain[name])}
    assert kinds == {"point": PointwiseConv, "drop": Dropout}
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), quick.state_dict().values(), strict=True))
    assert list(plain.state_dict()) == list(quick.state_dict())
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(quick["point"](x), plain["point"](x))
    with masks_from(torch.Generator().manual_seed(1)):
        once = quick["drop"](x)
    with masks_from(torch.Generator().manual_seed(1)):
        assert torch.equal(quick["drop"](x), once)
    assert torch.equal(copy.deepcopy(quick).eval()["drop"](x), x)


def test_the_networks_of_runs_have_them(tiny_config) -> None:
    layers = list(build_denoiser(tiny_config()).network.modules())
    assert any(type(layer) is PointwiseConv for layer in layers)
    assert any(type(layer) is Dropout for layer in layers)
    assert not any(type(layer) is nn.Dropout for layer in layers)
