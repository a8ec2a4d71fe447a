"""Parts of a batch side by side on a CPU: one thread's operations need not wait for the other's, as those of a team do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from .. import rng
from ..nets.blocks import masks_from
from ..performance.timing import PassTimer
from .batches import Batch
from .optimizer import Parts

T = TypeVar("T")


class ThreadParallel:
    """Does several things at once, each on its share of PyTorch's threads.

    Args:
        most: things at once.
    """

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(max(most - 1, 1), thread_name_prefix="shard")

    def __call__(self, works: Sequence[Callable[[], T]]) -> list[T]:
        """Return what each has come to, the first one done in this thread.

        What PyTorch keeps for each thread (autocast, whether gradients are wanted) is as new in the others.

        Raises:
            Whatever one of them raises, once all have ended.
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
    side_by_side: ThreadParallel,
    shards: Sequence[Batch],
    parts: Parts,
    forward: Callable[[Batch], tuple[Tensor, Tensor]],
    passes: PassTimer,
    key: rng.Key,
) -> Tensor:
    """Add gradients of several shards, computed at once, to those that parameters have.

    Args:
        side_by_side: what computes them.
        shards: rows of each.
        parts: whose parameters have gradients.
        forward: of a shard: stages' summed losses, and what is to be differentiated.
        passes: times what is done in this thread.
        key: of this draw of dropout; each shard has masks of its own.

    Returns:
        The summed loss of each stage.
    """
    parameters = [parameter for own in parts.values() for parameter in own]

    def gradients(number: int) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        with masks_from(rng.generator((*key, number))):
            sums, loss = forward(shards[number])
        with passes.backward():
            return sums, torch.autograd.grad(loss, parameters, allow_unused=True)

    found = side_by_side([partial(gradients, number) for number in range(len(shards))])
    with passes.timer.part("gradients"):
        for _, own in found:  # always in the same order
            add_gradients(parameters, own)
    return torch.stack([sums for sums, _ in found]).sum(0)


def add_gradients(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients, None where there is none, to those that parameters have."""
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
