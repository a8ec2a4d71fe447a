"""Strategy "time": the paper's Algorithm 4 (time-efficient).

Every process holds the whole network and trains rows of all stages in one encoder pass.
"""

from __future__ import annotations

from ...config import RunConfig
from ...distributed import World
from . import STRATEGIES
from .replicated import ReplicatedParts


@STRATEGIES.add("time")
class Time(ReplicatedParts):
    """Every process holds the whole network."""

    def __init__(self, config: RunConfig, shape: tuple[int, ...], world: World) -> None:
        super().__init__(config, shape, world, [tuple(range(world.size))] * len(config.stages))
