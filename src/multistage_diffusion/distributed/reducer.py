"""Gradients summed over the processes that hold a parameter, while the backward pass still computes the others.

Sums, not means: the objective already divides by the rows of the whole step, so that the sum of all processes' gradients is
the gradient of the one objective, whoever trained which rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 4 << 20  # large enough for the bandwidth, small enough to leave early


class _Bucket:
    """Parameters whose gradients travel together."""

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self.waiting = 0  # gradients that the backward pass has yet to make
        self.flat: Tensor | None = None
        self.work: dist.Work | None = None

    def launch(self) -> int:
        """Begin the sum; return its bytes."""
        self.flat = torch.cat(
            [(p.new_zeros(p.numel()) if p.grad is None else p.grad.reshape(-1)) for p in self.parameters]
        )
        self.work = dist.all_reduce(self.flat, group=self.group, async_op=True)
        return self.flat.nbytes

    def finish(self) -> None:
        """Wait for the sum and make it the gradients."""
        assert self.flat is not None
        assert self.work is not None
        self.work.wait()
        sizes = [p.numel() for p in self.parameters]
        for parameter, sums in zip(self.parameters, self.flat.split_with_sizes(sizes), strict=True):
            parameter.grad = sums.view_as(parameter)
        self.flat = self.work = None


class Reducer:
    """Sums gradients, part by part of a network.

    Args:
        parts: {name: parameters} held by this process, in the order of the forward pass.
        groups: {name: process group, or None where nobody else holds the part}.
        bucket_bytes: gradients that travel together.

    Attributes:
        bytes: handed to all-reduce so far. Of n bytes, a ring sends and receives 2 (W - 1) / W n on each of W processes.
    """

    def __init__(
        self,
        parts: Mapping[str, Sequence[nn.Parameter]],
        groups: Mapping[str, dist.ProcessGroup | None],
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        self.bucket_bytes, self.bytes = bucket_bytes, 0
        # the last layers' gradients come first
        self.parts = {name: list(reversed(parts[name])) for name in reversed(list(parts)) if groups[name] is not None}
        self.groups = groups
        self._buckets: dict[str, list[_Bucket]] = {}  # of parts whose parameters in use are known
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
        """Let go of the parameters."""
        for handle in self._handles:
            handle.remove()

    def start(self, active: Iterable[str], busy: Iterable[str]) -> None:
        """Expect gradients, before the backward pass that completes them.

        Args:
            active: parts with rows on any process; the others are left alone.
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
        """Wait until every gradient of an active part is the sum over all processes.

        Raises:
            RuntimeError: if a process is lost, as in the backward pass itself; see World.translate_errors.
        """
        self._armed = False
        self._launch(len(self._queue))
        for name in self._active:
            if name not in self._buckets:
                # in the first step the parameters that take part are not yet known
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
        """Begin sums in the order of the queue, which is the same on all processes."""
        for i in range(self._launched, end):
            bucket, before = self._queue[i], self._queue[i - 1] if i else None
            if before is not None and before.group is not bucket.group and before.work is not None:
                before.work.wait()  # NCCL's groups may not have work in flight at once; it only orders streams there
            self.bytes += bucket.launch()
        self._launched = max(self._launched, end)

    def _make(self, name: str) -> list[_Bucket]:
        """Divide a part's parameters into buckets; those that get no gradient on any process take no part.

        Which ones do is the same in every step: it is asked once.
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
