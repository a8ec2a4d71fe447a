"""Which way of computing a run's steps is fastest on its device: a short trial at its start, remembered in RUN/execution.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, Protocol

import torch

from ..config import RunConfig
from ..config.execution import ExecutionConfig
from ..config.serialization import from_dict, to_dict
from ..distributed import World
from ..errors import UserError
from .devices import clock, device_name
from .execution import Execution
from .offload import free_memory

LEAST_STEPS = 2000  # of a run that a trial is worth
COMPILING_PAYS = 1800.0  # seconds of training left, from which on minutes of compiling are tried
GAIN = 0.97  # of the plain way's time: what is not clearly faster is left alone, so that equal runs stay equal
WARM = (4, 1)  # passes that are not timed: memory is reserved in the first; twice, since machines change their pace
TIMED = 2  # passes of each candidate in each round
COPIES = 0.25  # of free memory, for the gradients of shards


def check_execution(asked: Execution, device: torch.device, processes: int) -> None:
    """Raise UserError if CUDA graphs or shards are asked for where there are none."""
    for name, wanted, kind in (
        ("cuda_graphs=True", asked.cuda_graphs, "cuda"),
        (f"shards={asked.shards}", asked.shards > 1, "cpu"),
    ):
        if wanted and (device.type != kind or processes > 1):
            raise UserError(
                f"execution.{name} needs one process on a {kind.upper()} device, not {processes} on {device}; set it to auto"
            )


def settled(settings: ExecutionConfig) -> Execution:
    """Return what the settings ask for, without what a trial would decide."""
    return Execution(
        channels_last=settings.channels_last is True,
        compile=settings.compile is True,
        cuda_graphs=settings.cuda_graphs is True,
        shards=1 if settings.shards == "auto" else settings.shards,
        recompute=settings.recompute,
    )


def candidates(
    config: RunConfig, device: torch.device, *, alone: bool, weights: int = 1, compiling: bool = False
) -> Iterator[Execution]:
    """Yield the ways between which a trial decides, the plainest first.

    Args:
        config: of the run: what its `execution` says outright is the same in all.
        device: of the run.
        alone: whether one process trains it; a graph's gradients, and those of shards, come all at once,
            too late to be summed on the way.
        weights: bytes of the parameters: each shard has gradients of its own.
        compiling: whether to yield those that "auto" compiles, instead of those that it does not.
    """
    settings, cuda = config.execution, device.type == "cuda"
    fixed_rows = config.training.update_mode == "mixed" and config.training.accumulate == 1
    graphs_help = cuda and alone and fixed_rows and not settings.recompute
    channels_last = (False, True) if settings.channels_last == "auto" else (settings.channels_last,)
    if settings.compile != "auto":
        compiled = () if compiling else (settings.compile,)
    else:
        compiled = ((True,) if cuda and alone else ()) if compiling else (False,)
    graphs = ((False, True) if graphs_help else (False,)) if settings.cuda_graphs == "auto" else (settings.cuda_graphs,)
    most = 1
    if device.type == "cpu" and alone and settings.compile is not True and not settings.recompute:
        most = max(1, min(torch.get_num_threads(), int(COPIES * free_memory(device) / weights)))
    shards = sorted({1, most}) if settings.shards == "auto" else [settings.shards]
    for one, other, several, last in product(compiled, graphs, shards, channels_last):
        yield Execution(
            compile=one, cuda_graphs=other, shards=several, channels_last=last, recompute=settings.recompute
        )


class KeptExecutions(Protocol):
    """Where the result of a trial is kept: a run."""

    def known_execution(self, here: dict[str, Any]) -> dict[str, bool] | None:
        """Return what an earlier trial has found on the same device with the same settings."""

    def remember_execution(self, here: dict[str, Any], execution: Execution, seconds: dict[str, float]) -> None:
        """Keep what a trial has found."""


def choose(
    kept: KeptExecutions,
    config: RunConfig,
    world: World,
    device: torch.device,
    weights: int,
    steps: int,
    compute: Callable[[Execution], None],
    passes: Callable[[], None],
) -> dict[str, float]:
    """Let steps be computed in the way that is fastest here, as an earlier start has found or by a trial.

    All processes decide the same. What a trial finds is kept in the run.

    Args:
        kept: the run, which keeps what a trial finds.
        config: of a trainer.
        world: the processes that train it.
        device: of this one.
        weights: bytes of the parameters.
        steps: that are left to do.
        compute: lets steps be computed in a way.
        passes: makes the forward and backward passes of a step.

    Returns:
        The seconds of a step of each candidate, by its words; empty if no trial was made.
    """
    here = {"device": device_name(device), "settings": to_dict(config.execution)}
    known = world.broadcast_object(kept.known_execution(here))
    if known is not None:
        compute(from_dict(Execution, known))
        return {}
    alone = world.size == 1
    plain, *others = candidates(config, device, alone=alone, weights=weights)
    compiled = list(candidates(config, device, alone=alone, compiling=True))
    if steps < LEAST_STEPS or not (others or compiled):
        compute(plain)
        return {}

    def timed(way: Execution, warm: int) -> list[float]:
        taken = []
        try:
            compute(way)
            for _ in range(warm + TIMED):
                start = clock(device)
                passes()
                taken.append(clock(device) - start)
        except RuntimeError:  # no memory for it, or no compiler
            if way == plain or world.size > 1:
                raise
            return [math.inf]
        return taken[warm:]

    def typical(ways: Sequence[Execution], rounds: Sequence[int]) -> dict[Execution, float]:
        taken: dict[Execution, list[float]] = {way: [] for way in ways}
        for warm, way in product(rounds, ways):
            if math.inf not in taken[way]:
                taken[way] += timed(way, warm)
        medians = torch.tensor([statistics.median(taken[way]) for way in ways], dtype=torch.float64, device=device)
        return dict(zip(ways, world.all_reduce(medians).tolist(), strict=True))

    seconds = typical([plain, *others], WARM)
    if compiled and min(seconds.values()) * steps >= COMPILING_PAYS:
        seconds |= typical(compiled, WARM[:1])
    best = min(seconds, key=lambda execution: seconds[execution])
    if seconds[best] > GAIN * seconds[plain]:
        best = plain
    compute(best)
    found = {execution.words(): taken for execution, taken in seconds.items() if math.isfinite(taken)}
    if world.is_main_process:
        kept.remember_execution(here, best, found)
    return found
