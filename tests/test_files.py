from __future__ import annotations

import errno
import math
import os
import pickle
import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from multistage_diffusion import files
from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.errors import UserError
from multistage_diffusion.files import cache_folder, new_file, write_atomic, write_json


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


# --- modes, links, leftovers -------------------------------------------------------------------------------------------


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o077, 0o022, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_new_files_and_folders_follow_the_umask(umask: int, tmp_path: Path) -> None:
    files.write_atomic(tmp_path / "new" / "a", b"1")
    files.append_line(tmp_path / "lines", {})
    with files.locked(tmp_path / "lock", "busy"), files.new_folder(tmp_path / "folder") as folder:
        files.write_file(folder / "b", b"2")
    for name in ("new/a", "lines", "lock", "folder/b"):
        assert mode(tmp_path / name) == 0o666 & ~umask
    for name in ("new", "folder"):
        assert mode(tmp_path / name) == 0o777 & ~umask


@pytest.mark.parametrize("wanted", [0o600, 0o640, 0o755])
def test_a_file_that_is_replaced_keeps_its_mode(wanted: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"1")
    path.chmod(wanted)
    files.write_atomic(path, b"2")
    files.append_line(path, {})
    assert mode(path) == wanted


def lock(path: Path) -> None:
    with files.locked(path, "busy"):
        pass


@pytest.mark.parametrize("write", [lambda p: files.append_line(p, {"a": 1}), lock, lambda p: files.write_file(p, b"x")])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo"])
def test_nothing_is_written_through_what_is_no_file(write: Callable[[Path], None], kind: str, tmp_path: Path) -> None:
    target, path = tmp_path / "precious", tmp_path / "path"
    if kind != "dangling":
        target.write_bytes(b"precious")
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    with pytest.raises(UserError, match="path: "):
        write(path)
    assert target.exists() == (kind != "dangling")
    assert not target.exists() or target.read_bytes() == b"precious"


def test_an_atomic_write_replaces_a_link_and_not_what_it_points_to(tmp_path: Path) -> None:
    target, path = tmp_path / "precious", tmp_path / "path"
    target.write_bytes(b"precious")
    path.symlink_to(target)
    files.write_atomic(path, b"mine")
    assert (target.read_bytes(), path.read_bytes(), path.is_symlink()) == (b"precious", b"mine", False)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "to-fifo").symlink_to(tmp_path / "fifo")
    for name in ("fifo", "to-fifo"):
        with pytest.raises(UserError, match=f"{name}: is a device, pipe or socket"):
            files.write_atomic(tmp_path / name, b"")
    with pytest.raises(UserError, match="is a folder"):
        files.write_atomic(tmp_path, b"")


def test_a_lock_is_held_and_never_truncated(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    path.write_bytes(b"kept")
    with files.locked(path, "busy"), pytest.raises(UserError, match="busy"):
        lock(path)
    lock(path)
    assert path.read_bytes() == b"kept"


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail() -> None:
        with files.new_folder(tmp_path / "folder") as folder:
            files.write_file(folder / "a", b"1")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    with pytest.raises(UserError, match="folder: exists"), files.new_folder(tmp_path / "folder"):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "mine"]


# --- what the disk refuses ---------------------------------------------------------------------------------------------


def make(path: Path) -> None:
    with files.new_folder(path):
        pass


@pytest.mark.parametrize(
    ("code", "mend"), [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "free"), (errno.EROFS, "choose another place")]
)
@pytest.mark.parametrize(
    ("write", "at"),
    [
        (lambda p: files.write_atomic(p, b"1"), "fsync"),
        (lambda p: files.append_line(p, {}), "write"),
        (lock, "open"),
        (make, "rename"),
        (files.make_folder, "mkdir"),
    ],
)
def test_what_the_disk_refuses_names_file_and_mend(
    write: Callable[[Path], None], at: str, code: int, mend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, at, refuse)
        with pytest.raises(UserError, match=rf"out: cannot be written \({os.strerror(code)}\); {mend}"):
            write(tmp_path / "out")
    assert [p.stat().st_size for p in tmp_path.iterdir()] in ([], [0])  # a log that is new stays, empty


def test_a_line_that_did_not_fit_leaves_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real = tmp_path / "log", os.write
    files.append_line(path, {"a": 1})
    before, parts = path.read_bytes(), iter([True])

    def half(handle: int, data: bytes) -> int:
        if next(parts, False):
            return real(handle, data[:4])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(UserError, match="No space left"):
            files.append_line(path, {"b": 2})
    assert path.read_bytes() == before


def test_a_refusal_of_the_disk_can_be_told_to_other_processes() -> None:
    error = files.NotWrittenError("runs/x: cannot be written", OSError(errno.ENOSPC, "full"))
    told = pickle.loads(pickle.dumps(error))
    assert (type(told), str(told), told.errno, told.strerror) == (type(error), str(error), errno.ENOSPC, "full")


def test_a_full_disk_names_the_folder_that_is_made_and_not_its_temporary_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = f"{tmp_path / 'run' / 'config.json'}: cannot be written (No space left on device)"
    with files.new_folder(tmp_path / "run") as folder, monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        with pytest.raises(UserError, match=rf"^{re.escape(named)}"):
            files.write_file(folder / "config.json", b"{}")


def test_a_file_written_in_parts_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "set.zip"
    with new_file(path) as file:
        file.write(b"one")
        assert not path.exists()
        file.write(b"two")
    assert path.read_bytes() == b"onetwo"

    def interrupted() -> None:
        with new_file(path, overwrite=True) as file:
            file.write(b"three")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"onetwo"
    assert [p.name for p in path.parent.iterdir()] == ["set.zip"]


def test_a_file_that_exists_or_comes_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "set.zip"

    def overtaken() -> None:
        with new_file(path) as file:
            file.write(b"new")
            path.write_bytes(b"other")

    with pytest.raises(UserError, match=r"set\.zip: exists"):
        overtaken()
    assert path.read_bytes() == b"other"
    path.chmod(0o640)
    with new_file(path, overwrite=True) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["set.zip"]


@pytest.mark.parametrize("failing", ["fsync", "replace", "open"])
def test_a_disk_error_in_parts_names_the_file(failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(files.os, failing, full)
        with pytest.raises(UserError, match=r"set\.zip: cannot be written"), new_file(tmp_path / "set.zip") as file:
            file.write(b"new")
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_where_the_environment_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MSDIFF_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("x") == tmp_path / ".cache" / "multistage-diffusion" / "x"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("x") == tmp_path / "xdg" / "multistage-diffusion" / "x"
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "own"))
    assert cache_folder("x") == tmp_path / "own" / "x"
