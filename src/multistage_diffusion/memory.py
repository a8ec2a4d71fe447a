"""Available memory, and an early refusal of work that would need more."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

MEMINFO = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes of main memory available now, within the limits of this process's control groups."""
    if MEMINFO.exists():  # MemAvailable counts the file cache, which is freed on demand
        machine = 1024 * int(re.findall(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)[0])
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([machine, *_left_in_groups()])


def require_memory(needed: float, what: str, mend: str, available: int | None = None) -> None:
    """Refuse work that would need more memory than is available.

    Args:
        needed: least number of bytes that the work takes.
        what: the field or option that needs them, with its value.
        mend: how to fix it.
        available: bytes available; None: `available_memory()`.

    Raises:
        UserError: naming `what`, both amounts and `mend`.
    """
    there = available_memory() if available is None else available
    if needed > there:
        raise UserError(f"{what} needs at least {_gib(needed)} of memory, but {_gib(there)} can be had; {mend}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _left_in_groups() -> Iterator[int]:
    """Yield the free bytes of each limited control group: the process's own and its parents, of both versions."""
    if not OWN_GROUPS.exists():
        return
    for line in OWN_GROUPS.read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = GROUPS / "memory" if controllers else GROUPS
        limit, usage = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        folder = root / place.strip("/")
        if not folder.exists():  # in a container the root is its own group
            folder = root
        for group in (folder, *folder.parents):
            left = _left(group, limit, usage)
            if left is not None:
                yield left
            if group == root:
                break


def _left(group: Path, limit: str, usage: str) -> int | None:
    """Return the free bytes of a group; None without a limit."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        files = re.findall(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such file, or an unknown format
        return None
    if not most.isdigit():
        return None  # "max"
    return max(0, int(most) - used + max(map(int, files), default=0))
