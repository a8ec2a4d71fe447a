from __future__ import annotations

import os
from pathlib import Path

import pytest

from multistage_diffusion import memory
from multistage_diffusion.errors import UserError
from multistage_diffusion.memory import available_memory, require_memory


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 1000 KiB, without control groups yet."""
    (tmp_path / "meminfo").write_text("MemTotal: 9999 kB\nMemFree: 1 kB\nMemAvailable:    1000 kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "GROUPS", tmp_path / "groups")
    return tmp_path


def group(folder: Path, names: tuple[str, str], limit: str, used: int, stat: str = "inactive_file 0\n") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


NEW, OLD = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_the_machine_s_own(machine: Path) -> None:
    assert available_memory() == 1000 * 1024


def test_limits_of_control_groups(machine: Path) -> None:
    (machine / "own").write_text("0::/jobs/7\n")
    group(machine / "groups/jobs/7", NEW, "max", 5)
    assert available_memory() == 1000 * 1024
    group(machine / "groups/jobs", NEW, "5000", 3000, "anon 1\ninactive_file 500\n")  # of the group around it
    assert available_memory() == 2500
    group(machine / "groups/jobs/7", NEW, "1000", 2000)
    assert available_memory() == 0


def test_limits_of_the_first_version(machine: Path) -> None:
    (machine / "own").write_text("5:cpu:/a\n4:memory:/a\n")
    group(machine / "groups/memory/a", OLD, "9223372036854771712", 5)
    assert available_memory() == 1000 * 1024
    group(machine / "groups/memory/a", OLD, "7000", 3000, "inactive_file 1\ntotal_inactive_file 100\n")
    assert available_memory() == 4100


def test_inside_a_container_the_root_is_the_group(machine: Path) -> None:
    (machine / "own").write_text("0::/elsewhere\n")
    group(machine / "groups", NEW, "7000", 3000)
    assert available_memory() == 4000


def test_this_machine() -> None:
    assert 2**20 < available_memory() <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_what_needs_too_much_is_refused(machine: Path) -> None:
    require_memory(1000 * 1024, "batch=1", "take fewer")
    with pytest.raises(
        UserError, match=r"^batch=9 needs at least 2 GiB of memory, but 0.000954 GiB can be had; take fewer$"
    ):
        require_memory(2 * 2**30, "batch=9", "take fewer")
    require_memory(5, "a", "b", available=5)
    with pytest.raises(UserError, match="needs at least"):
        require_memory(6, "a", "b", available=5)
