"""How much memory there is, and a refusal of what would need more, before any is taken."""

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
    """Return the bytes of main memory that could be taken now: of the machine, and within this process's control groups."""
    if MEMINFO.exists():  # what the system keeps of files is given up when memory is asked for
        machine = 1024 * int(re.findall(r"^MemAvailable:\s+(\d+) kB", MEMINFO.read_text(), re.MULTILINE)[0])
    else:
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min([machine, *_left_in_groups()])


def require_memory(needed: float, what: str, mend: str, available: int | None = None) -> None:
    """Refuse what would need more memory than there is.

    Args:
        needed: bytes that it takes at least.
        what: the field or option, with its value, that needs them.
        mend: what to do instead.
        available: bytes there are; None: `available_memory()`.

    Raises:
        UserError: naming the three.
    """
    there = available_memory() if available is None else available
    if needed > there:
        raise UserError(f"{what} needs at least {_gib(needed)} of memory, but {_gib(there)} can be had; {mend}")


def _gib(size: float) -> str:
    return f"{size / 2**30:.3g} GiB"


def _left_in_groups() -> Iterator[int]:
    """Yield what each control group with a limit leaves: that of the process and those around it, of both versions."""
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
        if not folder.exists():  # inside a container the root is its own group
            folder = root
        for group in (folder, *folder.parents):
            left = _left(group, limit, usage)
            if left is not None:
                yield left
            if group == root:
                break


def _left(group: Path, limit: str, usage: str) -> int | None:
    """Return what a group leaves, None where it has no limit."""
    try:
        most, used = (group / limit).read_text().strip(), int((group / usage).read_text())
        files = re.findall(r"^(?:total_)?inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no such file, or an unknown kernel's
        return None
    if not most.isdigit():
        return None  # "max"
    return max(0, int(most) - used + max(map(int, files), default=0))
