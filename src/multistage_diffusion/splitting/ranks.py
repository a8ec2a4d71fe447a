"""Several processes (torchrun) that split one data set together: each takes a share of the samples, or of the images."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Where this process stands among `world` others.

    Processes come in groups of `image_shards`; a group draws the same samples, each process of it sums over its share of
    the images. Every sample is numbered, so what is found does not depend on how many there are, to rounding.

    Raises:
        UserError: if the processes do not make whole groups.
    """

    rank: int = 0
    world: int = 1
    image_shards: int = 1

    def __post_init__(self) -> None:
        if self.image_shards < 1 or self.world % self.image_shards:
            raise UserError(
                f"split: image_shards={self.image_shards} must divide the number of processes, {self.world}; start another "
                "number of them with torchrun --nproc-per-node"
            )

    @classmethod
    def join(cls, image_shards: int = 1) -> Ranks:
        """Join the processes that torchrun started; alone without it."""
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world > 1 and not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
        return cls(rank=dist.get_rank() if world > 1 else 0, world=world, image_shards=image_shards)

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def shard(self) -> tuple[int, int]:
        """(i, n): this process sums over the i-th of n shares of the images."""
        return self.rank % self.image_shards, self.image_shards

    def share(self, numbers: range) -> range:
        """Return the samples that this process's group draws."""
        return numbers[self.rank // self.image_shards :: self.world // self.image_shards]

    def gather(self, mine: Tensor, numbers: range) -> Tensor:
        """Return what all groups found of their shares (K', ...), float CPU tensors, in the samples' order (K, ...)."""
        if self.world == 1:
            return mine
        groups = self.world // self.image_shards
        longest = -(-len(numbers) // groups)
        padded = torch.cat((mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])))
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        of_groups = torch.stack(parts[:: self.image_shards], dim=1)  # (longest, groups, ...): sample i * groups + g
        return of_groups.flatten(0, 1)[: len(numbers)]

    def agree(self, value: float) -> float:
        """Return the first process's value: rounding must not let some go on where others stop."""
        if self.world > 1:
            told = torch.tensor(value, dtype=torch.float64)
            dist.broadcast(told, 0)
            return float(told)
        return value

    def reduce(self, values: Tensor, how: Literal["sum", "max"]) -> None:
        """Make values the sum or largest over the processes of this group, in place."""
        if self.image_shards > 1:
            group = _groups(self.world, self.image_shards)[self.rank // self.image_shards]
            dist.all_reduce(values, dist.ReduceOp.SUM if how == "sum" else dist.ReduceOp.MAX, group=group)


_KNOWN: dict[tuple[int, int], list[Any]] = {}


def _groups(world: int, image_shards: int) -> list[Any]:
    """Return the groups of processes that share the images; all processes must ask for them together, once."""
    if (world, image_shards) not in _KNOWN:
        members = [list(range(start, start + image_shards)) for start in range(0, world, image_shards)]
        _KNOWN[world, image_shards] = [dist.new_group(ranks) for ranks in members]  # all take part in making each
    return _KNOWN[world, image_shards]
