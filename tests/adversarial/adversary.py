"""What the tests of bad inputs share: a case, and what every refusal must be like."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import signal
import stat
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multistage_diffusion import cli

SECONDS = 10  # of this process's time in which a refusal must come; each takes far less
PATIENCE = 60  # seconds by the clock: for a command that waits, on a busy machine
TINY = (
    "--set",
    "network.encoder_width=8",
    "network.decoder_widths=[8,8,8]",
    "network.blocks_per_level=1",
    "network.channel_mult=[1]",
    "network.attention_factors=[]",
    "training.shares=uniform",
    "training.batch=6",
    "training.steps=2",
    "training.log_every=1",
    "training.checkpoint_every=1",
    "training.held_out_every=1",
    "training.held_out_rows=2",
    "training.sample_every=0",
    "sampling.calls=4",
)
_TOLD = (  # what commands tell before they can know that they must refuse
    re.compile(r".+: \d+ images?, (no labels|\d+ class(es)?), \d+ x \d+, (grey|colour)\b.*"),
    re.compile(r".+: resuming with [\w.]+=.+ \(was .+\)"),
    re.compile(r"msdiff: warning: .+"),
)
_SECRETS = ("Traceback", "object at 0x", "<class '", "[Errno", "site-packages")


def nothing(_folder: Path) -> None:
    """Prepare nothing."""


@dataclass(frozen=True)
class Case:
    """A command line that must be refused.

    Attributes:
        name: of the case.
        arguments: of msdiff, run in a folder that holds what `make` has made.
        make: makes the bad input in that folder.
        says: a regular expression that the message fits.
        needs: what of the material is copied into the folder first.
    """

    name: str
    arguments: tuple[str, ...]
    make: Callable[[Path], Any] = nothing
    says: str = ""
    needs: tuple[str, ...] = ()


def cases(table: list[Case]) -> Any:
    """Parametrise a test by a table of cases with names of their own."""
    names = [case.name for case in table]
    assert len(set(names)) == len(names), [name for name in names if names.count(name) > 1]
    return pytest.mark.parametrize("case", table, ids=names)


class Slow(BaseException):
    """A command took longer than it may."""


@contextmanager
def deadline() -> Iterator[None]:
    """Raise Slow when the block has computed for SECONDS, or after PATIENCE, whatever it waits for."""

    def stop(*_: object) -> None:
        raise Slow(f"still running after {SECONDS} s of computing, or {PATIENCE} s")

    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, PATIENCE)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _ in timers.values():
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def snapshot(folder: Path) -> dict[str, str]:
    """Return what lies in a folder, with digests of files; a lock is no result."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        what = stat.filemode(mode)[0]
        if stat.S_ISREG(mode) and path.name != ".lock":
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = what
    return {name: what for name, what in found.items() if Path(name).name != ".lock"}


def refused(case: Case, folder: Path, material: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run a case; return the one line that refuses it, having checked everything that holds for every refusal."""
    for name in case.needs:
        source = material / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / name)
    case.make(folder)
    before, here = snapshot(folder), Path.cwd()
    capsys.readouterr()
    os.chdir(folder)
    try:
        with deadline(), warnings.catch_warnings():
            code = cli.main([str(argument) for argument in case.arguments])
    finally:
        os.chdir(here)
    output, errors = capsys.readouterr()
    lines = [line for line in errors.splitlines() if line.strip()]
    said = [line for line in lines if not any(told.fullmatch(line) for told in _TOLD)]
    assert code == 2, f"exit code {code}\n{output}\n{errors}"
    assert len(said) == 1, errors
    assert lines[-1] == said[0], errors
    (line,) = said
    assert line.startswith("msdiff: "), errors
    assert not any(secret in errors for secret in _SECRETS), errors
    assert line.isprintable(), ascii(line)
    assert len(line) < 1200, line
    assert re.search(case.says, line), f"{line!r} does not say {case.says!r}"
    assert snapshot(folder) == before, "something was left behind"
    return line


# -- inputs -----------------------------------------------------------------------------------------------------------


def pixels(count: int = 40, height: int = 8, width: int = 8) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return random grey images."""
    return np.random.default_rng(0).integers(0, 256, (count, height, width), dtype=np.uint8)


def npz(**arrays: Any) -> bytes:
    """Return an .npz file."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    """Return a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def file(name: str, content: bytes | str) -> Callable[[Path], None]:
    """Return what writes a file."""

    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content)

    return make


def files(contents: dict[str, bytes | str]) -> Callable[[Path], None]:
    """Return what writes several files."""

    def make(folder: Path) -> None:
        for name, content in contents.items():
            file(name, content)(folder)

    return make


def edited(name: str, change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Return what changes a JSON file: `change` alters its content, or returns another."""

    def make(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        other = change(content)
        path.write_text(json.dumps(content if other is None else other))

    return make


def put(*keys: str | int, value: Any) -> Callable[[Any], None]:
    """Return what sets a value deep in JSON data."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def drop(*keys: str | int) -> Callable[[Any], None]:
    """Return what removes a value deep in JSON data."""

    def change(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def cut(name: str, share: float) -> Callable[[Path], None]:
    """Return what truncates a file to a share of its length."""

    def make(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return make


def removed(name: str) -> Callable[[Path], None]:
    """Return what deletes a file or folder."""

    def make(folder: Path) -> None:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    return make


def fifo(name: str) -> Callable[[Path], None]:
    """Return what puts a pipe, to which nobody writes, in a file's place."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def folder_in_place(name: str) -> Callable[[Path], None]:
    """Return what puts a folder in a file's place."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir(parents=True)

    return make


def both(*makers: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Return what makes one thing after another."""

    def make(folder: Path) -> None:
        for maker in makers:
            maker(folder)

    return make


DEEP = "[" * 3000 + "]" * 3000
BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(8)
)
