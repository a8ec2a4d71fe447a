"""Thread parallelism: the parts of a batch are computed in parallel on CPU threads.

Each part uses its own threads. Unlike with intra-op parallelism, threads of different parts do not synchronise after
every operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import rng
from ..performance.cpu import masks_from
from ..performance.timing import PassTimer
from .batches import Batch

T = TypeVar("T")


class ThreadParallel:
    """Runs several functions in parallel, each on its share of PyTorch's threads.

    Args:
        most: number of functions that run in parallel.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._pool = ThreadPoolExecutor(max(most - 1, 1), thread_name_prefix="part")

    def __call__(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Return the result of each function; the first one runs in the calling thread.

        In the other threads, PyTorch's thread-local state (autocast, grad mode) has its default values.

        Raises:
            Exception: raised by a function, after all have ended; the first in order if several raise.
        """
        threads = torch.get_num_threads()
        each = max(1, threads // len(works))

        def limited(work: Callable[[], T]) -> T:
            if torch.get_num_threads() != each:
                torch.set_num_threads(each)
            return work()

        torch.set_num_threads(each)
        try:
            others = [self._pool.submit(limited, work) for work in works[1:]]
            try:
                first = works[0]()
            finally:
                wait(others)
            return [first, *(other.result() for other in others)]
        finally:
            torch.set_num_threads(threads)

    def backward(
        self,
        batch: Batch,
        parameters: Sequence[nn.Parameter],
        forward: Callable[[Batch], tuple[Tensor, Tensor]],
        passes: PassTimer,
        key: rng.Key,
    ) -> Tensor:
        """Compute the gradients of a batch, a part of it in each thread, and add them to the parameters' gradients.

        Args:
            batch: the batch.
            parameters: parameters to differentiate.
            forward: maps a batch to (summed loss of each stage, scalar to differentiate).
            passes: timer of the passes in the calling thread.
            key: random key of the dropout masks; each part of the batch has its own masks.

        Returns:
            The summed loss of each stage.
        """

        def gradients(number: int, rows: Batch) -> tuple[Tensor, tuple[Tensor | None, ...]]:
            with masks_from(rng.generator((*key, number))):
                sums, loss = forward(rows)
            with passes.backward():
                return sums, torch.autograd.grad(loss, parameters, allow_unused=True)

        found = self([partial(gradients, *numbered) for numbered in enumerate(batch.shards(self.most))])
        with passes.timer.part("gradients"):
            for _, own in found:  # fixed order, for reproducible sums
                add_gradients(parameters, own)
        return torch.stack([sums for sums, _ in found]).sum(0)


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients (None: no gradient) to the .grad of the parameters."""
    old, new = [], []
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient
        else:
            old.append(parameter.grad)
            new.append(gradient)
    if old:
        torch._foreach_add_(old, new)
