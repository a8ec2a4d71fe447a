"""Sums gradients over the processes that hold a parameter, overlapped with the backward pass.

Gradients are summed, not averaged: the objective already divides by the rows of the whole step. The sum over processes
is therefore the gradient of the objective, however the rows are assigned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 4 << 20  # large enough for full bandwidth, small enough to start early


class _Bucket:
    """Parameters whose gradients are summed in one all_reduce."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self.waiting = 0  # gradients that the backward pass has not computed yet
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    def launch(self) -> int:
        """Start the all_reduce; return its bytes."""
        self.flat = torch.cat(
            [(p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1)) for p in self.parameters]
        )
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)
        return self.flat.nbytes

    def finish(self) -> None:
        """Wait for the all_reduce and store the sums as gradients."""
        assert self.flat is not None
        assert self.work is not None
        self.work.wait()
        sizes = [p.numel() for p in self.parameters]
        for parameter, sums in zip(self.parameters, self.flat.split_with_sizes(sizes), strict=True):
            parameter.grad = sums.view_as(parameter)
        self.flat = self.work = None


class Reducer:
    """Sums the gradients of the parts of a network over processes, in buckets.

    Args:
        parts: {name: parameters} held by this process, in the order of the forward pass.
        groups: {name: process group, or None if no other process holds the part}.
        bucket_bytes: a bucket is closed when it reaches this size.

    Attributes:
        bytes: bytes passed to all_reduce so far. For n bytes, a ring all_reduce sends and receives 2 (W - 1) / W n
            bytes on each of W processes.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[nn.Parameter]],
        groups: Mapping[str, dist.ProcessGroup | None],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.bucket_bytes, self.bytes = bucket_bytes, 0
        # the backward pass computes the gradients of the last layers first
        self.parts = {name: list(reversed(parts[name])) for name in reversed(list(parts)) if groups[name] is not None}
        self.groups = groups
        self._buckets: dict[str, list[_Bucket]] = {}  # of parts whose used parameters are known
        self._home: dict[nn.Parameter, _Bucket] = {}
        self._queue: list[_Bucket] = []
        self._launched = 0
        self._armed = False
        self._handles = [
            p.register_post_accumulate_grad_hook(self._arrived)  # type: ignore[no-untyped-call]
            for part in self.parts.values()
            for p in part
        ]

    def close(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()

    def start(self, active: Iterable[str], busy: Iterable[str]) -> None:
        """Prepare for the backward pass that completes the gradients.

        Args:
            active: parts with rows on any process; the other parts are not summed.
            busy: parts with rows on this process.
        """
        self._active = [name for name in self.parts if name in set(active)]
        idle = set(self._active) - set(busy)
        self._queue = [bucket for name in self._active for bucket in self._buckets.get(name, ())]
        self._launched, self._armed = 0, True
        for name in self._active:
            for bucket in self._buckets.get(name, ()):
                bucket.waiting = 0 if name in idle else len(bucket.parameters)

    def finish(self) -> None:
        """Wait until the gradients of all active parts are summed over their processes.

        Raises:
            RuntimeError: if a process is lost, as in the backward pass itself; see World.translate_errors.
        """
        self._armed = False
        self._launch(len(self._queue))
        for name in self._active:
            if name not in self._buckets:
                # in the first step of a part, its used parameters are not known yet
                self._buckets[name] = made = self._make(name)
                self._queue += made
                self._launch(len(self._queue))
        for bucket in self._queue:
            bucket.finish()
        self._queue = []

    def _arrived(self, parameter: nn.Parameter) -> None:
        bucket = self._home.get(parameter)
        if not self._armed or bucket is None:
            return
        bucket.waiting -= 1
        ready = self._launched
        while ready < len(self._queue) and self._queue[ready].waiting <= 0:
            ready += 1
        self._launch(ready)

    def _launch(self, end: int) -> None:
        """Start all_reduces in the order of the queue, which is the same on all processes."""
        for i in range(self._launched, end):
            bucket, before = self._queue[i], self._queue[i - 1] if i else None
            if before is not None and before.group is not bucket.group and before.work is not None:
                before.work.wait()  # NCCL forbids concurrent work in two groups; with NCCL, wait() only orders streams
            self.bytes += bucket.launch()
        self._launched = max(self._launched, end)

    def _make(self, name: str) -> list[_Bucket]:
        """Divide a part's parameters into buckets, without those that get no gradient on any process.

        The used parameters are the same in every step, so they are determined only once.
        """
        group = self.groups[name]
        assert group is not None
        parameters = self.parts[name]
        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX, group=group)
        buckets: list[_Bucket] = []
        gathered: list[nn.Parameter] = []
        size = 0
        for parameter in (p for p, flag in zip(parameters, used.tolist(), strict=True) if flag):
            gathered.append(parameter)
            size += parameter.nbytes
            if size >= self.bucket_bytes:
                buckets.append(_Bucket(gathered, group))
                gathered, size = [], 0
        if gathered:
            buckets.append(_Bucket(gathered, group))
        self._home |= {p: bucket for bucket in buckets for p in bucket.parameters}
        return buckets
