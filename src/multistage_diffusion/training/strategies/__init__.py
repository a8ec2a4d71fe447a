"""Strategies: how the processes of a world share the network, its rows and its gradients.

All strategies train the same rows with the same objective, and checkpoints do not depend on the strategy. A run can
therefore change the strategy and the number of processes. A strategy is a file of this folder:

    @STRATEGIES.add("time")
    class Time(ReplicatedParts): ...
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...config import RunConfig
from ...denoisers import MultiStageDenoiser
from ...distributed import World, share
from ...errors import UserError
from ...nets import MultiDecoderNetwork
from ...registry import Registry
from ..optimizer import Parts, part_norms

STAGE = re.compile(r"\b(encoders|decoders)\.(\d+)\.")  # in the name of a tensor


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """Rows that a process computes in one forward and backward pass.

    Attributes:
        rows: rows of each stage.
        counted: whether the rows of a stage are this process's own. Rows that are not count nothing: they are computed
            because all processes must call a part together.
    """

    rows: tuple[range, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True, kw_only=True)
class PartShare:
    """What a process holds of a part of the network, and sends of it in a step.

    Attributes:
        held: share of the parameters that the process keeps, with their gradients, moments and averages.
        processes: number of processes that exchange the part; 1: none.
        transfers: collectives of a step in which the process sends (n - 1) / n of the part; an all_reduce counts twice.
    """

    held: float
    processes: int
    transfers: int


class Strategy(ABC):
    """What each process of a world holds of a network, and how the processes train it together.

    Args:
        config: of the run.
        shape: (C, H, W) of the network's input.
        world: the processes; one process holds the whole network and communicates nothing.

    Attributes:
        stop_requested: whether any process has requested a stop, as of the last step.

    Raises:
        UserError: if there are more processes than rows of a batch, or the configuration does not suit the strategy.
    """

    def __init__(self, config: RunConfig, shape: tuple[int, ...], world: World) -> None:
        self.config, self.shape, self.world = config, shape, world
        self.stop_requested = False
        if world.size > config.training.batch:
            raise UserError(
                f"training.batch={config.training.batch} has fewer rows than there are processes, {world.size}; make it "
                "larger, or start fewer"
            )

    # -- rows ----------------------------------------------------------------------------------------------------------

    @abstractmethod
    def rows(self, counts: Sequence[int]) -> tuple[range, ...]:
        """Return this process's rows of each stage; the ranges of all processes partition each stage's rows."""

    def micro_batches(self, counts: Sequence[int], accumulate: int) -> list[MicroBatch]:
        """Divide this process's rows into at most `accumulate` micro-batches; none if it has no rows.

        Args:
            counts: rows of each stage in the whole step.
            accumulate: see training.accumulate.
        """
        rows = self.rows(counts)
        number = min(accumulate, max(map(len, rows)))
        return [MicroBatch(rows=part, counted=(True,) * len(rows)) for part in divided(rows, number)]

    # -- network -------------------------------------------------------------------------------------------------------

    @abstractmethod
    def place(self, network: MultiDecoderNetwork, device: torch.device, dtype: torch.dtype) -> None:
        """Reduce a whole network, in place, to what this process holds, and move it to a device and dtype."""

    def local(self, full: Tensor, like: Tensor) -> Tensor:
        """Return what this process holds of a tensor of the whole network; `like` is the tensor that holds it."""
        return full

    def whole(self, held: Tensor) -> Tensor:
        """Return the whole tensor of which this process holds a part; all processes that hold one call it."""
        return held

    @abstractmethod
    def gather_state(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the named tensors of the whole network on rank 0, and an empty dict on the others; all call it.

        Args:
            tensors: what this process holds; names of parameters, with or without a suffix.
        """

    @abstractmethod
    def gather_model(self, module: MultiStageDenoiser, build: Callable[[], MultiStageDenoiser]) -> MultiStageDenoiser:
        """Return a denoiser of the whole network on every process; all processes call it.

        Args:
            module: what this process holds; returned as is if that is the whole network.
            build: builds a denoiser of the whole network, whose weights are then overwritten.
        """

    @abstractmethod
    def part_shares(self, names: Iterable[str]) -> dict[str, PartShare]:
        """Return this process's share of each of the named parts that it holds, see `MultiDecoderNetwork.parts`."""

    # -- gradients -----------------------------------------------------------------------------------------------------

    def watch(self, parts: Parts, *, shared: bool) -> None:
        """Register the parameters whose gradients are summed; called again after branching.

        Args:
            parts: parameters held by this process, by part.
            shared: whether all stages share one decoder or slices of it.
        """
        return

    def expect(self, counts: Sequence[int]) -> None:
        """Prepare to sum gradients over processes during the next backward pass, the last one of the step.

        Args:
            counts: rows of each stage in the whole step.
        """
        return

    def sum_gradients(self) -> None:
        """Wait until the gradients are summed over all processes."""
        return

    def sync_overflow(self, gradients: Sequence[Tensor]) -> None:
        """Propagate an overflow of fp16 gradients on one process to all, so that either all skip the step or none."""
        return

    def norm_terms(self, parts: Parts) -> dict[str, Tensor]:
        """Return the terms whose sum over processes is the gradient norm of each part; see `norm_of_sum`."""
        return part_norms(parts)

    def norm_of_sum(self, total: Tensor) -> Tensor:
        """Return the norm of a part, given the sum of its terms over processes."""
        return total

    def reduce_metrics(
        self, totals: Tensor, parts: Parts, names: Sequence[str], *, stopping: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss sums over all processes, and the gradient norms of all parts that have a gradient.

        Args:
            totals: summed loss of each stage over this process's rows.
            parts: parameters held by this process, by part.
            names: names of all parts of the whole network.
            stopping: whether this process has requested a stop.
        """
        if self.world.size == 1:  # reading values would synchronise the device
            return totals, part_norms(parts)
        terms = self.norm_terms(parts)
        values = torch.zeros(2, len(names), dtype=torch.float64, device=totals.device)
        for i, name in enumerate(names):
            if name in terms:
                values[0, i], values[1, i] = terms[name], 1.0
        flag = values.new_tensor([float(stopping)])
        summed = self.world.all_reduce(torch.cat([totals.to(values.dtype), values.flatten(), flag]))
        losses, sums, rest = torch.split(summed, [len(totals), len(names), len(names) + 1])
        *present, stops = rest.tolist()
        self.stop_requested = stops > 0
        # norms of fp32 gradients are fp32, so the cast is exact
        dtype = torch.float64 if self.config.training.precision == "fp64" else torch.float32
        norms = {name: self.norm_of_sum(sums[i]).to(dtype) for i, name in enumerate(names) if present[i]}
        return losses.to(totals.dtype), norms


STRATEGIES: Registry[type[Strategy]] = Registry("strategy", __name__)


def make_strategy(name: str, config: RunConfig, shape: tuple[int, ...], world: World) -> Strategy:
    """Return the strategy of a name for the processes of a world.

    Args:
        name: see STRATEGIES.
        config: of the run.
        shape: (C, H, W) of the network's input.
        world: the processes.

    Raises:
        UserError: for an unknown name, or if configuration and world do not suit the strategy.
    """
    return STRATEGIES[name](config, shape, world)


def stage_rows(stage: int, count: int, rank: int, ranks: Sequence[int]) -> range:
    """Return the rows of a stage that one of several processes trains.

    Each stage starts with another process, so that remainders do not accumulate on one.

    Args:
        stage: the stage, from 0.
        count: its rows.
        rank: a process.
        ranks: the processes that train the stage; the ranges of all of them partition its rows.
    """
    if rank not in ranks:
        return range(0)
    return share(count, (ranks.index(rank) + stage) % len(ranks), len(ranks))


def divided(rows: Sequence[range], number: int) -> list[tuple[range, ...]]:
    """Return the rows of each stage divided into `number` consecutive, almost equal parts."""
    parts = []
    for k in range(number):
        pieces = [share(len(own), k, number) for own in rows]
        parts.append(tuple(range(own.start + p.start, own.start + p.stop) for own, p in zip(rows, pieces, strict=True)))
    return parts


def stage_of(name: str, *, separate: bool) -> int | None:
    """Return the stage of a tensor (named as in the denoiser), None for a tensor that all stages share.

    Args:
        name: of the tensor.
        separate: see network.separate.
    """
    found = STAGE.search(name)
    return None if found is None or (found[1] == "encoders" and not separate) else int(found[2])


def stage_of_part(name: str) -> int | None:
    """Return the stage (from 0) of a part, see `MultiDecoderNetwork.parts`; None for the shared encoder."""
    _, _, number = name.partition(".")
    return int(number) - 1 if number else None
