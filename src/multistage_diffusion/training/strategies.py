"""Assignment of stages and rows to processes: the paper's Algorithms 3 and 4, on any number of processes.

"time" (Algorithm 4, time-efficient): every process holds the whole network and trains rows of all stages in one encoder
pass. "memory" (Algorithm 3, memory-efficient): a process holds only the encoder and the decoders of its own stages,
with their gradients, EMA and optimiser state. Processes are assigned to stages by the cost of the stages. Both train
the same rows with the same objective, so a run can change the strategy and the number of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn

from ..config import RunConfig
from ..distributed import share
from ..errors import UserError
from ..nets import MultiDecoderNetwork
from ..nets.cost import network_cost
from .batches import row_counts, stage_shares
from .branching import STAGE, tied

Strategy = Literal["time", "memory"]
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)


class Absent(nn.Module):
    """Placeholder for a part of the network that this process does not hold."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Assignment of stages to processes.

    Attributes:
        holders: ranks that hold each stage's decoder (and its encoder, if each stage has one), ascending.
        separate: whether each stage has its own encoder.
    """

    holders: tuple[tuple[int, ...], ...]
    separate: bool = False

    def held(self, rank: int) -> tuple[int, ...]:
        """Return the stages that a process holds, from 0."""
        return tuple(k for k, ranks in enumerate(self.holders) if rank in ranks)

    def everywhere(self, size: int) -> bool:
        """Tell whether each of `size` processes holds the whole network."""
        return all(len(ranks) == size for ranks in self.holders)

    def rows(self, rank: int, counts: Sequence[int]) -> tuple[range, ...]:
        """Return the rows of each stage that a process trains; the ranges of all processes partition each stage's rows.

        Each stage starts with a different holder, so that remainders do not accumulate on one process.
        """
        found = []
        for stage, (count, ranks) in enumerate(zip(counts, self.holders, strict=True)):
            if rank not in ranks:
                found.append(range(0))
                continue
            place = (ranks.index(rank) + stage) % len(ranks)
            found.append(share(count, place, len(ranks)))
        return tuple(found)

    def owner(self, stage: int | None) -> int:
        """Return the first rank that holds a stage's tensors; 0 for the tensors of all stages (None)."""
        return 0 if stage is None else self.holders[stage][0]

    def stage_of(self, name: str) -> int | None:
        """Return the stage of a tensor (named as in the denoiser), None for a tensor that all stages share."""
        found = STAGE.search(name)
        return None if found is None or (found[1] == "encoders" and not self.separate) else int(found[2])

    def drop(self, network: MultiDecoderNetwork, rank: int) -> None:
        """Remove the parts that a process does not hold, unless the stages still share a decoder (branch_at)."""
        if tied(network):
            return
        for stage in set(range(len(self.holders))) - set(self.held(rank)):
            network.decoders[stage] = Absent()
            if self.separate:
                network.encoders[stage] = Absent()


def stage_of_part(name: str) -> int | None:
    """Return the stage, from 0, of a part named as in MultiDecoderNetwork.parts; None for the shared encoder."""
    number = name.partition(".")[2]
    return int(number) - 1 if number else None


def make_layout(strategy: Strategy, config: RunConfig, shape: Sequence[int], size: int) -> Layout:
    """Assign the stages to `size` processes.

    Args:
        strategy: see above.
        config: of the run.
        shape: (C, H, W) of the network's input.
        size: number of processes.

    Raises:
        UserError: for an unknown strategy, for "memory" with fp16 and separate networks on several processes, or if
            there are more processes than rows of a batch, or (with "memory") more holders of a stage than its rows.
    """
    if strategy not in STRATEGIES:
        raise UserError(f"strategy={strategy!r} must be one of {', '.join(STRATEGIES)}")
    training, stages = config.training, len(config.stages)
    shares = stage_shares(training, config.stages, config.diffusion.prior)
    counts = row_counts(training, shares)
    if size > 1 and strategy == "memory" and config.network.separate and training.precision == "fp16":
        raise UserError(
            "training.precision='fp16' with network.separate and strategy 'memory': a process without rows has no gradients to "
            "scale; use bf16, or strategy 'time'"
        )
    if size > training.batch:
        raise UserError(
            f"training.batch={training.batch} has fewer rows than there are processes, {size}; make it larger, or start fewer"
        )
    if strategy == "time" or size == 1:
        return Layout(holders=(tuple(range(size)),) * stages, separate=config.network.separate)
    per_row = [stage.true_flops for stage in network_cost(config.network, *shape[1:]).stages]
    # with "one-stage", a stage trains the whole batch in its share of the steps
    rows = [share * training.batch for share in shares] if training.update_mode == "one-stage" else counts
    holders = deal([n * cost for n, cost in zip(rows, per_row, strict=True)], size)
    for stage, (count, ranks) in enumerate(zip(counts, holders, strict=True)):
        if len(ranks) > max(count, 1):
            raise UserError(
                f"strategy='memory': {len(ranks)} of {size} processes would share the {count} rows of stage {stage + 1}; "
                f"make training.batch={training.batch} larger, start fewer processes, or use strategy 'time'"
            )
    return Layout(holders=tuple(holders), separate=config.network.separate)


def deal(costs: Sequence[float], size: int) -> list[tuple[int, ...]]:
    """Assign processes to stages, minimising the largest load of a process.

    With at least as many processes as stages, each stage gets one process; each further process joins the stage with
    the largest load per process. This is optimal. With fewer processes, stages are assigned in order of decreasing
    cost, each to the process with the smallest load (Graham 1969; at most 4/3 of the optimum).

    Args:
        costs: cost of each stage, in any unit; 0 for a stage that is not trained.
        size: number of processes.

    Returns:
        The ranks of each stage. They are consecutive, to keep a decoder's all_reduce within a machine where possible.
    """
    stages = range(len(costs))
    if size >= len(costs):
        numbers = [1] * len(costs)
        for _ in range(size - len(costs)):
            numbers[max(stages, key=lambda k: costs[k] / numbers[k])] += 1
        firsts = [sum(numbers[:k]) for k in stages]
        return [tuple(range(first, first + n)) for first, n in zip(firsts, numbers, strict=True)]
    load, chosen = [0.0] * size, [0] * len(costs)
    for stage in sorted(stages, key=lambda k: -costs[k]):
        rank = min(range(size), key=lambda r: load[r])
        load[rank] += costs[stage]
        chosen[stage] = rank
    return [(rank,) for rank in chosen]
