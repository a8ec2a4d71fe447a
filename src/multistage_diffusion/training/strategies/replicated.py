"""Parts held whole: each part is on one or several processes, which sum its gradients by all_reduce."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...config import RunConfig
from ...denoisers import MultiStageDenoiser
from ...distributed import World
from ...distributed.reducer import Reducer
from ...nets import MultiDecoderNetwork
from ..optimizer import Parts, part_norms
from . import PartShare, Strategy, stage_of, stage_of_part, stage_rows


class Absent(nn.Module):
    """Placeholder for a part of the network that this process does not hold."""


class ReplicatedParts(Strategy):
    """Each process holds whole parts: the shared encoder, and the parts of its own stages.

    Args:
        config, shape, world: see Strategy.
        holders: ranks that hold each stage's decoder (and its encoder, if each stage has one), ascending.

    Attributes:
        reducer: sums the gradients; None for a single process, and before `watch`.
    """

    def __init__(
        self, config: RunConfig, shape: tuple[int, ...], world: World, holders: Sequence[tuple[int, ...]]
    ) -> None:
        super().__init__(config, shape, world)
        self.holders = tuple(holders)
        self.reducer: Reducer | None = None
        self._groups: list[dist.ProcessGroup | None] | None = None
        self._stages: dict[str, tuple[int, ...]] = {}  # stages that use each part held here

    @property
    def stages(self) -> tuple[int, ...]:
        """Stages that this process holds, from 0."""
        return tuple(k for k, ranks in enumerate(self.holders) if self.world.rank in ranks)

    def owner(self, stage: int | None) -> int:
        """Return the first rank that holds a stage's tensors; 0 for the tensors of all stages (None)."""
        return 0 if stage is None else self.holders[stage][0]

    def rows(self, counts: Sequence[int]) -> tuple[range, ...]:
        """Return this process's rows of each stage: its share of those of the stages that it holds."""
        pairs = zip(counts, self.holders, strict=True)
        return tuple(stage_rows(k, count, self.world.rank, ranks) for k, (count, ranks) in enumerate(pairs))

    # -- network -------------------------------------------------------------------------------------------------------

    def place(self, network: MultiDecoderNetwork, device: torch.device, dtype: torch.dtype) -> None:
        """Remove the parts of other processes' stages, unless the stages still share a decoder (branch_at)."""
        if not network.tied:
            for stage in set(range(len(self.holders))) - set(self.stages):
                network.decoders[stage] = Absent()
                if self.config.network.separate:
                    network.encoders[stage] = Absent()
        network.to(device, dtype)

    def _owns(self, tensor: str) -> bool:
        return self.owner(stage_of(tensor, separate=self.config.network.separate)) == self.world.rank

    def gather_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather the tensors on rank 0, each from its owner."""
        return self.world.gather_named({name: value for name, value in tensors.items() if self._owns(name)})

    def gather_model(self, module: MultiStageDenoiser, build: Callable[[], MultiStageDenoiser]) -> MultiStageDenoiser:
        """Broadcast each tensor from its owner, unless every process holds the whole network."""
        if module.network.tied or all(len(ranks) == self.world.size for ranks in self.holders):
            return module
        own, whole = module.state_dict(), build()
        for name, tensor in whole.state_dict().items():
            if name in own:
                tensor.copy_(own[name])
            self.world.broadcast(tensor, self.owner(stage_of(name, separate=self.config.network.separate)))
        return whole.eval().requires_grad_(False)

    def part_shares(self, names: Iterable[str]) -> dict[str, PartShare]:
        """Return the parts held here; gradients are summed over the holders of a part."""
        found = {}
        for name in names:
            stage = stage_of_part(name)
            if stage is None or stage in self.stages:
                number = self.world.size if stage is None else len(self.holders[stage])
                found[name] = PartShare(held=1.0, processes=number, transfers=2)
        return found

    # -- gradients -----------------------------------------------------------------------------------------------------

    def watch(self, parts: Parts, *, shared: bool) -> None:
        """Sum the gradients of each part over its holders, overlapped with the backward pass."""
        if self.world.size == 1:
            return
        if self._groups is None:
            self._groups = [self.world.group(ranks) for ranks in self.holders]
        if self.reducer is not None:
            self.reducer.close()
        everybody = self.world.group(range(self.world.size))
        self._stages = {name: self._users(name, shared) for name in parts}
        groups = {}
        for name in parts:
            stage = stage_of_part(name)
            groups[name] = everybody if shared or stage is None else self._groups[stage]
        self.reducer = Reducer(parts, groups)

    def _users(self, name: str, shared: bool) -> tuple[int, ...]:
        """Return the stages that use a part; while they share a decoder, there is one module for each width."""
        stage, widths = stage_of_part(name), self.config.network.decoder_widths
        if stage is None:
            return tuple(range(len(widths)))
        return tuple(k for k, width in enumerate(widths) if k == stage or (shared and width == widths[stage]))

    def expect(self, counts: Sequence[int]) -> None:
        """Tell the reducer which parts have rows on any process, and which on this one."""
        if self.reducer is not None:
            own = [len(rows) for rows in self.rows(counts)]
            self.reducer.start(self._used(counts), self._used(own))

    def _used(self, counts: Sequence[int]) -> list[str]:
        """Return the parts held here that are used, given the number of rows of each stage."""
        return [name for name, stages in self._stages.items() if any(counts[k] for k in stages)]

    def sum_gradients(self) -> None:
        """Wait for the reducer."""
        if self.reducer is not None:
            self.reducer.finish()

    def sync_overflow(self, gradients: Sequence[Tensor]) -> None:
        """Make the first gradient infinite on all processes if any gradient is not finite on one of them."""
        if self.world.size == 1:
            return
        overflowed = (~torch.isfinite(nn.utils.get_total_norm(gradients))).to(gradients[0].device, torch.float32)
        if float(self.world.all_reduce(overflowed)):
            gradients[0].fill_(math.inf)

    def norm_terms(self, parts: Parts) -> dict[str, Tensor]:
        """Return the norms of the parts of which this process is the owner, so that each counts once."""
        norms = part_norms(parts)
        return {name: norm for name, norm in norms.items() if self.owner(stage_of_part(name)) == self.world.rank}
