"""Execution of a network: memory format, compilation, CUDA graphs; results are the same except for rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..config.training import ExecutionConfig
from ..contracts import Conditioning
from ..errors import UserError
from ..nets import MultiDecoderNetwork
from ..nets.blocks import ImageConv
from ..nets.network import blocks_of

WARM_UPS = 3  # passes before graph capture, in which kernels are selected


@dataclass(frozen=True, kw_only=True)
class Execution:
    """Execution of a network; see config/training.py for the fields."""

    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False
    thread_parallel: int = 1
    recompute: bool = False

    def words(self) -> str:
        """Return a description, "plain" if all fields have their defaults."""
        chosen = [f.name.replace("_", " ") for f in fields(self) if getattr(self, f.name) is True]
        return ", ".join(chosen + [f"{self.thread_parallel} threads"] * (self.thread_parallel > 1)) or "plain"


def check_execution(asked: Execution, device: torch.device, processes: int) -> None:
    """Raise UserError if CUDA graphs or threads are requested on another device, or with several processes."""
    for name, wanted, kind in (
        ("cuda_graphs=True", asked.cuda_graphs, "cuda"),
        (f"thread_parallel={asked.thread_parallel}", asked.thread_parallel > 1, "cpu"),
    ):
        if wanted and (device.type != kind or processes > 1):
            raise UserError(
                f"execution.{name} needs one process on a {kind.upper()} device, not {processes} on {device}; set it to auto"
            )


def settled(settings: ExecutionConfig) -> Execution:
    """Return the execution of the settings, with every "auto" resolved to the plain choice."""
    return Execution(
        channels_last=settings.channels_last is True,
        compile=settings.compile is True,
        cuda_graphs=settings.cuda_graphs is True,
        thread_parallel=1 if settings.thread_parallel == "auto" else settings.thread_parallel,
        recompute=settings.recompute,
    )


def execute(network: nn.Module, execution: Execution) -> None:
    """Apply memory format, compilation and recomputation to a network; the caller handles CUDA graphs and threads.

    Raises:
        UserError: if blocks are to be recomputed or compiled, and the network has none.
    """
    blocks = list(blocks_of(network))
    for name in ("recompute", "compile"):
        if getattr(execution, name) and not blocks:
            raise UserError(f"execution.{name}=True: this family of networks has no blocks for that; set it to false")
    if execution.compile:  # blocks share compiled code; every shape is compiled separately
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, len(blocks))
    for block in blocks:
        block.recompute = execution.recompute
        if execution.compile:
            block.compile(dynamic=False)
        else:
            block._compiled_call_impl = None  # undoes nn.Module.compile, which has no public inverse
    for module in network.modules():
        if isinstance(module, ImageConv):
            module.memory_format = torch.channels_last if execution.channels_last else torch.contiguous_format


class Graphs:
    """Calls a network through CUDA graphs, one for each kind of call.

    The kind is the shapes and dtypes of the inputs, rows per stage, which labels are given, gradients, training mode
    and autocast. The result of a call is valid until the next call of the same kind.

    Args:
        network: on a CUDA device, without hooks on the network itself.
    """

    def __init__(self, network: MultiDecoderNetwork) -> None:
        self.network = network
        self._recorded: dict[object, Callable[..., Tensor]] = {}

    def __call__(self, x: Tensor, noise: Tensor, counts: Sequence[int], cond: Conditioning | None = None) -> Tensor:
        """Return the network's output, see `MultiDecoderNetwork.forward`; the first call of a kind captures its graph."""
        cond = cond or Conditioning()
        given = {"labels": cond.labels, "augment": cond.augment}
        inputs = [x, noise, *(tensor for tensor in given.values() if tensor is not None)]
        learns, device = torch.is_grad_enabled(), x.device.type
        kind = (
            tuple(counts),
            tuple((tensor.shape, tensor.dtype) for tensor in inputs),
            learns,
            self.network.training,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )
        if kind not in self._recorded:
            call = _Call(self.network, tuple(counts), [name for name, tensor in given.items() if tensor is not None])
            with torch.autocast(
                device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), cache_enabled=False
            ):
                record = _recorded_with_gradients if learns else _recorded
                self._recorded[kind] = record(call, inputs)
        return self._recorded[kind](*inputs)


class _Call(nn.Module):
    """The call of a network as a function of tensors only."""

    def __init__(self, network: MultiDecoderNetwork, counts: tuple[int, ...], given: Sequence[str]) -> None:
        super().__init__()
        self.network, self.counts, self.given = network, counts, given
        self.training = network.training

    def forward(self, x: Tensor, noise: Tensor, *labels: Tensor) -> Tensor:
        cond: dict[str, Any] = dict(zip(self.given, labels, strict=True))
        out: Tensor = self.network(x, noise, self.counts, Conditioning(**cond))
        return out


def _recorded_with_gradients(call: _Call, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    examples = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in inputs)
    torch.cuda.make_graphed_callables(  # decoders without rows leave inputs unused
        call, examples, num_warmup_iters=WARM_UPS, allow_unused_input=True
    )
    return call  # its forward now replays the graph


def _recorded(call: _Call, inputs: Sequence[Tensor]) -> Callable[..., Tensor]:
    own = [tensor.clone() for tensor in inputs]
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            call(*own)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out: Tensor = call(*own)

    def replay(*given: Tensor) -> Tensor:
        for mine, theirs in zip(own, given, strict=True):
            mine.copy_(theirs)
        graph.replay()
        return out

    return replay
