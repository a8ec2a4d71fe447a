"""Communication between processes that train or sample together, independent of the launcher."""

from __future__ import annotations

from .heartbeat import RankLost
from .world import ALONE, World, in_many, is_main_process, join, share

__all__ = ["ALONE", "RankLost", "World", "in_many", "is_main_process", "join", "share"]
