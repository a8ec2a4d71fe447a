"""How long work tells of itself."""

from collections.abc import Callable

Progress = Callable[[int, int], None]  # (done, total)
