"""Roofline of a device: the rates of the network's largest convolution and of a matrix product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import NetworkConfig
from ..nets.cost import BACKWARD
from ..nets.network import meta_network, meta_run
from .devices import clock

LEAST_SECONDS = 0.3  # minimum measuring time of each rate
MATRIX = {"cpu": 1024, "cuda": 8192}  # rows and columns of the product


@dataclass(frozen=True, kw_only=True)
class Convolution:
    """A convolution with the shapes of a training step.

    Attributes:
        rows: number of images.
        channels_in, channels_out, kernel, stride, padding: as in nn.Conv2d.
        height, width: of the input.
        flops: of the forward pass for all rows, 2 per multiply-add.
    """

    rows: int
    channels_in: int
    channels_out: int
    kernel: int
    stride: int
    padding: int
    height: int
    width: int
    flops: int


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """Rates in floating-point operations per second, of forward and backward pass together or of the forward pass only.

    Attributes:
        convolution: the network's convolution with the most operations.
        channels_last: whether channels-last format is faster for it.
        convolution_rate: its rate in the faster memory format.
        matrix_rate: rate of torch.mm.
    """

    convolution: Convolution
    channels_last: bool
    convolution_rate: float
    matrix_rate: float


def largest_convolution(network: NetworkConfig, shape: Sequence[int], counts: Sequence[int]) -> Convolution:
    """Return the convolution with the most operations in a step; of a network without any, the linear layer.

    A linear layer is a 1x1 convolution of as many pixels as it has tokens.

    Args:
        network: configuration of the network.
        shape: (C, H, W) of its input.
        counts: rows of each stage.
    """
    found: list[Convolution] = []

    def note(layer: nn.Conv2d | nn.Linear, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0]
        if isinstance(layer, nn.Linear):
            x = x.reshape(len(x), layer.in_features, -1, 1)
        found.append(
            Convolution(
                rows=len(x),
                channels_in=x.shape[1],
                channels_out=layer.weight.shape[0],
                kernel=1 if isinstance(layer, nn.Linear) else layer.kernel_size[0],
                stride=1 if isinstance(layer, nn.Linear) else layer.stride[0],
                padding=0 if isinstance(layer, nn.Linear) else int(layer.padding[0]),
                height=x.shape[2],
                width=x.shape[3],
                flops=2 * output.numel() * layer.weight[0].numel(),
            )
        )

    built = meta_network(network)
    kinds = [[m for m in built.modules() if isinstance(m, kind)] for kind in (nn.Conv2d, nn.Linear)]
    for layer in (kinds[0] if network.feature_maps else []) or kinds[1]:
        layer.register_forward_hook(note)
    _, height, width = shape
    meta_run(built, height, width, counts)
    return max(found, key=lambda c: c.flops)


def measure_roofline(
    network: NetworkConfig,
    shape: Sequence[int],
    counts: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    *,
    backward: bool = True,
) -> Roofline:
    """Measure the roofline of a training step or of sampling, which takes about two seconds.

    Args:
        network, shape, counts: see `largest_convolution`.
        device: to measure.
        dtype: of the computation.
        backward: whether to include the backward pass.
    """
    convolution = largest_convolution(network, shape, counts)
    formats = (torch.contiguous_format, torch.channels_last)
    times = 1 + BACKWARD if backward else 1
    layers = [_convolution_pass(convolution, device, dtype, f, backward) for f in formats]
    rates = [times * convolution.flops / _seconds(layer, device) for layer in layers]
    size = MATRIX.get(device.type, 1024)
    matrices = [torch.randn(size, size, device=device, dtype=dtype, requires_grad=True) for _ in range(2)]
    grad = torch.randn(size, size, device=device, dtype=dtype)

    def product() -> None:
        if backward:
            torch.mm(*matrices).backward(grad)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                torch.mm(*matrices)

    return Roofline(
        convolution=convolution,
        channels_last=rates[1] > rates[0],
        convolution_rate=max(rates),
        matrix_rate=times * 2 * size**3 / _seconds(product, device),
    )


def _convolution_pass(
    c: Convolution, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format, backward: bool
) -> Callable[[], None]:
    layer = nn.Conv2d(c.channels_in, c.channels_out, c.kernel, c.stride, c.padding)
    layer = layer.to(device, dtype, memory_format=memory_format)  # type: ignore[call-overload]
    x = torch.randn(c.rows, c.channels_in, c.height, c.width, device=device, dtype=dtype)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    grad = torch.randn_like(layer(x))

    def run() -> None:
        if backward:
            layer(x).backward(grad)
        else:
            with torch.no_grad():
                layer(x)

    return run


def _seconds(work: Callable[[], None], device: torch.device) -> float:
    """Return the time of `work` in seconds: the best of several rounds."""
    work()  # selects kernels and reserves memory
    best, spent = float("inf"), 0.0
    while spent < LEAST_SECONDS:
        start = clock(device)
        work()
        seconds = clock(device) - start
        best, spent = min(best, seconds), spent + seconds
    return best
