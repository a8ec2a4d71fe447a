from __future__ import annotations

import pytest
import torch

from multistage_diffusion.nets import build_network
from multistage_diffusion.performance import roofline
from multistage_diffusion.performance.roofline import largest_convolution, measure_roofline

SHAPE = (1, 4, 4)


def test_the_largest_convolution_is_that_of_most_operations_at_its_rows(tiny_config):
    network = tiny_config().network  # encoder 8, decoders 12, 8, 4; one level
    found = largest_convolution(network, SHAPE, (6, 4, 2))
    everything = []
    built = build_network(network)
    for layer in (m for m in built.modules() if isinstance(m, torch.nn.Conv2d)):
        layer.register_forward_hook(
            lambda layer, args, out: everything.append(2 * out.numel() * layer.weight[0].numel())
        )
    built(torch.zeros(12, *SHAPE), torch.zeros(12), (6, 4, 2))
    assert found.flops == max(everything)
    macs = found.rows * found.height * found.width * found.channels_out * found.channels_in * found.kernel**2
    assert found.flops == 2 * macs // found.stride**2
    few = largest_convolution(network, SHAPE, (1, 1, 40))
    assert few.rows in (40, 42)


def test_rates_are_positive_and_of_this_device(tiny_config):
    found = measure_roofline(tiny_config().network, SHAPE, (6, 4, 2), torch.device("cpu"))
    assert 0 < found.convolution_rate < 1e15
    assert 0 < found.matrix_rate < 1e15
    assert found.convolution == largest_convolution(tiny_config().network, SHAPE, (6, 4, 2))


@pytest.mark.parametrize(("backward", "times"), [(True, 3), (False, 1)])
def test_a_forward_pass_alone_is_a_third_of_the_work(tiny_config, monkeypatch, backward, times):
    gradients = []

    def seconds(work, device):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: gradients.append(t) or t, lambda t: t):
            work()
        return 2.0

    monkeypatch.setattr(roofline, "_seconds", seconds)
    found = measure_roofline(tiny_config().network, SHAPE, (6, 4, 2), torch.device("cpu"), backward=backward)
    assert found.convolution_rate == times * found.convolution.flops / 2
    assert found.matrix_rate == times * 2 * 1024**3 / 2
    assert bool(gradients) == backward
