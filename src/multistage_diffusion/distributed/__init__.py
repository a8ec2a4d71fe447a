"""Processes that train or sample together, whoever started them."""

from __future__ import annotations

from .heartbeat import RankLost
from .world import ALONE, World, join, share, speaks

__all__ = ["ALONE", "RankLost", "World", "join", "share", "speaks"]
