"""Strategy "memory": the paper's Algorithm 3 (memory-efficient).

A process holds only the encoder and the decoders of its own stages, with their gradients, EMA and optimiser state.
Processes are assigned to stages by the cost of the stages.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...config import RunConfig
from ...distributed import World
from ...errors import UserError
from ...nets.cost import network_cost
from ...shares import row_counts, stage_shares
from . import STRATEGIES
from .replicated import ReplicatedParts


@STRATEGIES.add("memory")
class Memory(ReplicatedParts):
    """A process holds the decoders of its own stages only.

    Raises:
        UserError: for fp16 with separate networks on several processes, or if more processes would share a stage than
            it has rows.
    """

    def __init__(self, config: RunConfig, shape: tuple[int, ...], world: World) -> None:
        training = config.training
        shares = stage_shares(training, config.stages, config.diffusion.prior)
        counts = row_counts(training, shares)
        per_row = [stage.true_flops for stage in network_cost(config.network, *shape[1:]).stages]
        # with "one-stage", a stage trains the whole batch in its share of the steps
        rows = [share * training.batch for share in shares] if training.update_mode == "one-stage" else counts
        holders = assign_stages([n * cost for n, cost in zip(rows, per_row, strict=True)], world.size)
        super().__init__(config, shape, world, holders)
        if world.size > 1 and config.network.separate and training.precision == "fp16":
            raise UserError(
                "training.precision='fp16' with network.separate and strategy 'memory': a process without rows has no "
                "gradients to scale; use bf16, or strategy 'time'"
            )
        for stage, (count, ranks) in enumerate(zip(counts, holders, strict=True)):
            if len(ranks) > max(count, 1):
                raise UserError(
                    f"strategy='memory': {len(ranks)} of {world.size} processes would share the {count} rows of stage "
                    f"{stage + 1}; make training.batch={training.batch} larger, start fewer processes, or use strategy 'time'"
                )


def assign_stages(costs: Sequence[float], size: int) -> list[tuple[int, ...]]:
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
