"""Foreign text is refused in one line, quickly, and never read past its bounds."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from multistage_diffusion.commands.options import load_config, parse_changes
from multistage_diffusion.config import SamplingConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import from_dict, override, read_json, read_lines
from multistage_diffusion.errors import UserError
from multistage_diffusion.reading import (
    DEEPEST,
    parse_json,
    parse_yaml,
    read_bytes,
    read_file,
    read_text,
    require_regular,
)

LISTS = "\n".join(
    [
        "a: &a [1, 1, 1, 1, 1, 1, 1, 1]",
        *(f"{b}: &{b} [{', '.join([f'*{a}'] * 8)}]" for a, b in itertools.pairwise("abcdefghi")),
    ]
)
MERGES = "\n".join(
    ["a: &a {x: 1}", *(f"{b}: &{b} {{<<: [{', '.join([f'*{a}'] * 8)}]}}" for a, b in itertools.pairwise("abcdefghi"))]
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LISTS, "more than 100,000 values once its aliases are written out"),
        (MERGES, "more than 100,000 values once its aliases are written out"),
        ("a: &a [*a]", "holds itself"),
        ("a: &a {b: *a}", "holds itself"),
        ("[" * 50_000, "nested too deep"),
        ("{a: " * 2_000 + "1" + "}" * 2_000, "nested too deep"),
        ("[" * 80 + "]" * 80, "nested too deep, more than 64 levels"),
        ("{1: 2}", "the key 1 must be text; put it in quotes"),
        ("{name: {true: 2}}", "the key True must be text"),
        ("{[1]: 2}", "not valid YAML"),
        ("2001-12-14", "is a date, which no setting is"),
        ("2001-99-99", "not valid YAML"),
        ("!!binary aGk=", "is a bytes"),
        ("!!set {a, b}", "is a set"),
        ("!!int x", "not valid YAML"),
        ("!!python/object/apply:os.system [ls]", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("a: [", "not valid YAML"),
        ("1" * 5000, "not valid YAML"),
        (" " * 300_000, "larger than 256 KiB"),
    ],
)
def test_yaml_that_is_refused(text: str, words: str) -> None:
    start = time.process_time()
    with pytest.raises(UserError, match=words) as caught:
        parse_yaml(text, "file.yaml")
    assert str(caught.value).startswith("file.yaml: ")
    assert time.process_time() - start < 5
    assert len(str(caught.value)) < 1000


def test_aliases_within_reason_are_read() -> None:
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: [*a, *a]}", "f") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": [{"x": 1}, {"x": 1}]},
    }
    assert parse_yaml("", "f") is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested too deep"),
        ("[" * 100 + "]" * 100, "nested too deep"),
        ('{"a":' * 100_000, "nested too deep"),
        ("1" * 5000, "not valid JSON"),
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
    ],
)
def test_json_that_is_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=rf"a\.json: {words}"):
        read_json(tmp_path / "a.json")
    nested = "[" * DEEPEST + "]" * DEEPEST
    assert parse_json(nested, "f") is not None


def test_special_and_large_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(bytes(100))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "empty").touch()
    for name, words in (
        ("fifo", "it is a named pipe"),
        ("large", "it holds 100 bytes, more than the 99"),
        ("gone", "no such file"),
    ):
        with pytest.raises(UserError, match=f"{name}: {words}"):
            read_bytes(tmp_path / name, 99)
    with pytest.raises(UserError, match="/dev/zero: it is a device, not a file"):
        read_bytes(Path("/dev/zero"), 99)
    with pytest.raises(UserError, match="it is a folder, not a file"):
        read_bytes(tmp_path, 99)
    with pytest.raises(UserError, match=r"latin: not valid text \(byte 3 is not UTF-8\)"):
        read_text(tmp_path / "latin", 99)
    assert read_text(tmp_path / "empty", 0) == ""
    with pytest.raises(UserError, match="fifo: it is a named pipe"):
        load_config(tmp_path / "fifo")


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (b"[1]\n{}\n", "line 1: expected a JSON object, got \\[1\\]"),
        (b"null\n", "line 1: expected a JSON object"),
        (b'{"a": 1}\n\n{"b": 1}\n', "line 2 is not JSON"),
        (b'{"a": 1}\n' + b"[" * 100_000 + b'\n{"b": 1}\n', "line 2: nested too deep"),
        (b'{"a": "\xff"}\n{"b": 1}\n', "line 1 is not UTF-8"),
    ],
)
def test_lines_that_are_refused(lines: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines)
    with pytest.raises(UserError, match=words):
        read_lines(tmp_path / "a.jsonl")


@pytest.mark.parametrize("torn", [b"", b'{"a', b'{"a": "\xc3', b"[" * 100_000])
def test_a_torn_last_line_is_left_out(torn: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n' + torn)
    assert read_lines(tmp_path / "a.jsonl") == [{"a": 1}]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("sampling.calls=1" + "0" * 30, "sampling.calls=10*0 must fit into 64 bits"),
        ("optimizer.lr=1" + "0" * 400, r"optimizer.lr=10* … \(401 characters\) must be a finite number"),
        ("optimizer.lr=1e999", "optimizer.lr=inf must be a finite number"),
        ("optimizer.lr=.nan", "optimizer.lr=nan must be a finite number"),
        ("stages.interior=[1e999]", r"stages.interior\[0\]=inf must be a finite number"),
        ("network={1: 2}", "the key 1 must be text"),
        ("stages.origin={1: 2}", "the key 1 must be text"),
        ("stages.origin={a: 2001-12-14}", "is a date"),
        ("diffusion.schedule={kind: [1]}", r"kind=\[1\] is unknown"),
        ("name=[[" + "1, " * 5000 + "]]", "must be text"),
    ],
)
def test_settings_that_are_refused(change: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        override(preset("digits"), parse_changes([change]))
    assert "\n" not in str(caught.value)


def test_values_of_many_types_are_never_a_bug() -> None:
    odd: list[Any] = [None, True, -1, 0, 2**70, 1e308, float("nan"), "", "x", [], [[]], {}, {"a": {}}]
    for name in SamplingConfig.__dataclass_fields__:
        for value in odd:
            with contextlib.suppress(UserError):
                from_dict(SamplingConfig, {name: value})


def test_a_file_is_read_up_to_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_file(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UserError, match="it holds 5 bytes, more than the 4 that are read"):
        read_file(tmp_path / "a", 4)
    with pytest.raises(UserError, match="no such file"):
        read_file(tmp_path / "b", 5)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="a Linux file system")
def test_a_file_without_a_length_is_bounded_too():
    with pytest.raises(UserError, match="it holds 11 bytes, more than the 10"):
        read_file(Path("/proc/self/status"), 10)


def test_what_is_no_file_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)
        server.bind("socket")
        for path, kind in {
            "pipe": "a named pipe",
            "socket": "a socket",
            "/dev/zero": "a device",
            ".": "a folder",
        }.items():
            with pytest.raises(UserError, match=f"it is {kind}, not a file"):
                require_regular(Path(path))
            with pytest.raises(UserError, match=f"it is {kind}, not a file"):
                read_file(Path(path), 10)
