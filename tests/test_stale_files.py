from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from multistage_diffusion import files, stale_files
from multistage_diffusion.files import write_atomic

KILLED = """
import os, signal, sys
from pathlib import Path
from multistage_diffusion import files
name, at = Path(sys.argv[1]), sys.argv[2]
real = getattr(os, at)
calls = 0
def kill(*given, **named):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
setattr(os, at, kill)
if name.suffix:
    files.write_atomic(name, b"new")
else:
    with files.new_folder(name, replace=True) as folder:
        files.write_file(folder / "a.txt", b"new")
"""


@pytest.mark.parametrize(
    ("name", "at", "call"),
    [("f.txt", "fsync", 1), ("f.txt", "replace", 1), ("d", "fsync", 1), ("d", "rename", 1), ("d", "rename", 2)],
)
def test_what_a_killed_process_left_goes_with_the_next_write(name: str, at: str, call: int, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix:
        path.write_bytes(b"old")
    else:
        path.mkdir()
        (path / "a.txt").write_bytes(b"old")
    (tmp_path / ".f.txt.writing-mine").write_bytes(b"another's")  # not a name of ours
    done = subprocess.run([sys.executable, "-c", KILLED, str(path), at, str(call)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) > 2
    stale_files.sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([".f.txt.writing-mine", name])
    assert (path if path.suffix else path / "a.txt").read_bytes() == b"old"


def test_what_a_living_process_is_making_stays(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "folder") as folder:
        files.write_file(folder / "a", b"1")
        files.write_atomic(tmp_path / "other", b"2")  # sweeps
        with files.new_folder(tmp_path / "third"):
            pass
        assert (folder / "a").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "other", "third"]


# --- folders -----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_about_to_get_its_name_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def late(old: Path, new: Path) -> None:
        subprocess.run([sys.executable, "-c", SWEEPS, str(tmp_path)], check=True)  # another process writes beside it
        replace(old, new)

    monkeypatch.setattr(os, "replace", late)
    write_atomic(tmp_path / "state.json", b"new")
    assert (tmp_path / "state.json").read_bytes() == b"new"


SWEEPS = (
    "import sys; from pathlib import Path; from multistage_diffusion.stale_files import sweep; sweep(Path(sys.argv[1]))"
)


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_a_sweep_takes_before_it_is_held_is_made_again(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, swept = fcntl.flock, []

    def late(handle: int, how: int) -> None:
        if not swept:
            swept.extend(tmp_path.glob(".it.writing-*"))
            for path in swept:
                path.rmdir() if path.is_dir() else path.unlink()
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", late)
    if what == "file":
        write_atomic(tmp_path / "it", b"new")
    else:
        with files.new_folder(tmp_path / "it") as folder:
            files.write_file(folder / "a", b"new")
    assert len(swept) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["it"]


def test_what_is_moved_aside_twice_in_a_second_gets_names_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stale_files.time, "strftime", lambda _: "20260101-120000")
    for number in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(str(number))
        files.move_aside(tmp_path / "run")
    aside = [tmp_path / f"run.replaced-20260101-120000{end}" for end in ("", "-2", "-3")]
    assert sorted(tmp_path.iterdir()) == aside
    assert [(folder / "config.json").read_text() for folder in aside] == ["0", "1", "2"]
    (tmp_path / "run").write_text("file")  # which a rename would put in the place of another
    (tmp_path / "run.replaced-20260101-120000-4").symlink_to(tmp_path / "absent")
    files.move_aside(tmp_path / "run")
    assert (tmp_path / "run.replaced-20260101-120000-5").read_text() == "file"
