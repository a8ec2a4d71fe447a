"""Autotuning: a short measurement at the start of a run selects the fastest execution, stored in RUN/execution.json."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any, Protocol

import torch

from ..config import RunConfig
from ..config.serialization import from_dict, to_dict
from ..distributed import World
from ..errors import UserError
from .devices import clock, device_name
from .execution import Execution
from .offload import free_memory

LEAST_STEPS = 2000  # minimum remaining steps for autotuning
COMPILING_PAYS = 1800.0  # minimum remaining seconds of training for trying compilation, which takes minutes
GAIN = 0.97  # maximum time relative to the plain execution; otherwise plain is kept, so equal runs stay equal
WARM = (4, 1)  # untimed passes per round; the first reserve memory; two rounds, since machine speed varies
TIMED = 2  # timed passes of each candidate in each round
COPIES = 0.25  # share of free memory for the gradients of parallel threads


def candidates(
    config: RunConfig, device: torch.device, *, alone: bool, weights: int = 1, compiling: bool = False
) -> Iterator[Execution]:
    """Yield the candidates for autotuning, the plainest first.

    Args:
        config: of the run; settings in its `execution` other than "auto" are the same in all candidates.
        device: of the run.
        alone: whether a single process trains. CUDA graphs and parallel threads yield all gradients at once, too
            late to overlap the all_reduce with the backward pass.
        weights: bytes of the parameters; each of several threads needs gradients of this size.
        compiling: whether to yield the compiled candidates of compile="auto" instead of the others.
    """
    settings, cuda = config.execution, device.type == "cuda"
    fixed_rows = config.training.update_mode == "mixed" and config.training.accumulate == 1
    graphs_help = cuda and alone and fixed_rows and not settings.recompute
    formats = (False, True) if config.network.feature_maps else (False,)
    channels_last = formats if settings.channels_last == "auto" else (settings.channels_last,)
    if settings.compile != "auto":
        compiled = () if compiling else (settings.compile,)
    else:
        compiled = ((True,) if cuda and alone else ()) if compiling else (False,)
    graphs = ((False, True) if graphs_help else (False,)) if settings.cuda_graphs == "auto" else (settings.cuda_graphs,)
    most = 1
    if device.type == "cpu" and alone and settings.compile is not True and not settings.recompute:
        most = max(1, min(torch.get_num_threads(), int(COPIES * free_memory(device) / weights)))
    threads = sorted({1, most}) if settings.thread_parallel == "auto" else [settings.thread_parallel]
    for one, other, several, last in product(compiled, graphs, threads, channels_last):
        yield Execution(
            compile=one, cuda_graphs=other, thread_parallel=several, channels_last=last, recompute=settings.recompute
        )


class KeptExecutions(Protocol):
    """Storage of autotuning results, implemented by a run."""

    def known_execution(self, here: dict[str, Any]) -> dict[str, bool] | None:
        """Return the result of earlier autotuning on the same device with the same settings; None if there is none."""

    def remember_execution(self, here: dict[str, Any], execution: Execution, seconds: dict[str, float]) -> None:
        """Store the result of autotuning."""


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
    """Select the fastest execution on this device, from a stored result or by autotuning.

    All processes make the same choice. The result of autotuning is stored in the run.

    Args:
        kept: the run, which stores the result.
        config: of the run.
        world: the processes that train.
        device: of this process.
        weights: bytes of the parameters.
        steps: number of remaining steps.
        compute: applies an execution to later steps.
        passes: runs the forward and backward passes of a step.

    Returns:
        Median seconds of the forward and backward passes of each candidate on the slowest process, by its description;
        empty without autotuning.
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
        except (RuntimeError, UserError):  # out of memory, no compiler, or no blocks to compile
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
        return dict(zip(ways, world.all_reduce(medians, "max").tolist(), strict=True))

    try:
        seconds = typical([plain, *others], WARM)
        if compiled and min(seconds.values()) * steps >= COMPILING_PAYS:
            seconds |= typical(compiled, WARM[:1])
    except BaseException:  # such as a stop, after which a step may follow
        compute(plain)
        raise
    best = min(seconds, key=lambda execution: seconds[execution])
    if seconds[best] > GAIN * seconds[plain]:
        best = plain
    compute(best)
    found = {execution.words(): taken for execution, taken in seconds.items() if math.isfinite(taken)}
    if world.is_main_process:
        kept.remember_execution(here, best, found)
    return found
