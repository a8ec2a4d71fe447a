"""Several processes that find the stages of one data set together: each takes a share of the samples, or of the images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed import ALONE, World
from ..errors import UserError


@dataclass(frozen=True, kw_only=True)
class Sharing:
    """What this process does of the work of a world.

    Processes come in groups of `image_shards`; a group draws the same samples, each process of it sums over its share of
    the images. Every sample is numbered, so what is found does not depend on how many there are, to rounding.

    Attributes:
        world: the processes.
        image_shards: how many of them divide the images among themselves.

    Raises:
        UserError: if the processes do not make whole groups.
    """

    world: World = ALONE
    image_shards: int = 1
    _made: list[dist.ProcessGroup | None] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.image_shards < 1 or self.world.size % self.image_shards:
            raise UserError(
                f"stages: image_shards={self.image_shards} must divide the number of processes, {self.world.size}; start "
                "another number of them with torchrun --nproc-per-node"
            )

    @property
    def groups(self) -> int:
        """Number of groups, each of which draws samples of its own."""
        return self.world.size // self.image_shards

    @property
    def shard(self) -> tuple[int, int]:
        """(i, n): this process sums over the i-th of n shares of the images."""
        return self.world.rank % self.image_shards, self.image_shards

    def share(self, numbers: range) -> range:
        """Return the samples that this process's group draws."""
        return numbers[self.world.rank // self.image_shards :: self.groups]

    def gather(self, mine: Tensor, numbers: range) -> Tensor:
        """Return what all groups found of their shares (K', ...), float CPU tensors, in the samples' order (K, ...)."""
        if self.world.size == 1:
            return mine
        longest = -(-len(numbers) // self.groups)
        padded = torch.cat((mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])))
        parts = self.world.all_gather(padded)
        of_groups = torch.stack(parts[:: self.image_shards], dim=1)  # (longest, groups, ...): sample i * groups + g
        return of_groups.flatten(0, 1)[: len(numbers)]

    def agree(self, value: float) -> float:
        """Return the first process's value: rounding must not let some go on where others stop."""
        return float(self.world.broadcast_object(value))

    def reduce(self, values: Tensor, how: Literal["sum", "max"]) -> None:
        """Make values the sum or largest over the processes of this group, in place."""
        if self.image_shards > 1:
            self.world.all_reduce_within(values, how, self._group())

    def _group(self) -> dist.ProcessGroup | None:
        """Return the processes that share the images with this one; all processes first ask for it together."""
        if not self._made:  # all take part in making each
            starts = range(0, self.world.size, self.image_shards)
            made = [self.world.group(range(start, start + self.image_shards)) for start in starts]
            self._made.append(made[self.world.rank // self.image_shards])
        return self._made[0]
