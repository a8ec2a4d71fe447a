"""Stage finding on several processes, which share the samples or the images of one data set."""

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
    """This process's share of the work.

    Processes form groups of `image_shards`. All processes of a group draw the same samples, and each of them sums over
    its share of the images. Samples are numbered, so the result does not depend on the number of processes, except for
    rounding.

    Attributes:
        world: the processes.
        image_shards: number of processes in a group; they share the images.

    Raises:
        UserError: if image_shards does not divide the number of processes.
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
        """Number of groups; each group draws different samples."""
        return self.world.size // self.image_shards

    @property
    def shard(self) -> tuple[int, int]:
        """(i, n): this process sums over the i-th of n shares of the images."""
        return self.world.rank % self.image_shards, self.image_shards

    def share(self, numbers: range) -> range:
        """Return the samples that this process's group draws."""
        return numbers[self.world.rank // self.image_shards :: self.groups]

    def gather(self, mine: Tensor, numbers: range) -> Tensor:
        """Gather the results of all groups (K', ...), floating-point CPU tensors, in the order of samples (K, ...)."""
        if self.world.size == 1:
            return mine
        longest = -(-len(numbers) // self.groups)
        padded = torch.cat((mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])))
        parts = self.world.all_gather(padded)
        of_groups = torch.stack(parts[:: self.image_shards], dim=1)  # (longest, groups, ...): sample i * groups + g
        return of_groups.flatten(0, 1)[: len(numbers)]

    def agree(self, value: float) -> float:
        """Return rank 0's value, so that rounding does not make processes decide differently."""
        return float(self.world.broadcast_object(value))

    def reduce(self, values: Tensor, how: Literal["sum", "max"]) -> None:
        """Replace values in place by their sum or maximum over the processes of this group."""
        if self.image_shards > 1:
            self.world.all_reduce_within(values, how, self._group())

    def _group(self) -> dist.ProcessGroup | None:
        """Return the process group that shares the images; the first call is collective over all processes."""
        if not self._made:  # creating a group is collective over all processes
            starts = range(0, self.world.size, self.image_shards)
            made = [self.world.group(range(start, start + self.image_shards)) for start in starts]
            self._made.append(made[self.world.rank // self.image_shards])
        return self._made[0]
