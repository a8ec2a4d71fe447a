from __future__ import annotations

import errno
import math
import os
import stat
from pathlib import Path

import pytest

from multistage_diffusion import files
from multistage_diffusion.files import write_atomic, write_json
from multistage_diffusion.serialization import read_json


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("failing", ["fsync", "replace", "open", "fdopen"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(files.os, failing, full)
        with pytest.raises(OSError, match="No space left"):
            write_atomic(path, b"new and longer")
        with pytest.raises(OSError, match="No space left"):
            write_atomic(tmp_path / "fresh.json", b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    path = tmp_path / "state.json"
    write_atomic(path, b"old")
    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_the_file_is_flushed_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (calls.append(f"fsync {os.fstat(fd).st_size}"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    write_atomic(tmp_path / "a.bin", b"12345")
    assert calls[:2] == ["fsync 5", "replace"]
    assert calls[2].startswith("fsync ")  # of the folder, so that the rename survives a power cut
    assert len(calls) == 3


def test_write_atomic_makes_folders_replaces_and_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.bin"
    write_atomic(path, b"one")
    write_atomic(path, b"two")
    assert path.read_bytes() == b"two"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_json_stays_standard_and_a_refusal_keeps_the_old_file(bad: float, tmp_path: Path) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match=r"metrics\.json: curves\.s0\.1=-?(nan|inf) cannot be written as JSON"):
        write_json(path, {"curves": {"s0": [0.5, bad]}})
    assert read_json(path) == {"loss": 1.0}
    assert len(list(tmp_path.iterdir())) == 1
