"""Bounded reading of foreign text files: regular files of limited size, JSON and YAML of limited depth and extent."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import UserError

JSON_LIMIT = 256 << 20  # bytes
LINES_LIMIT = 1 << 30  # bytes; for the log of a long run
YAML_LIMIT = 256 << 10  # bytes; PyYAML reads about 100 KiB/s
DEEPEST = 64  # levels of lists and mappings
MOST_NODES = 100_000  # values of a YAML text with aliases expanded

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a folder",
}


def require_regular(path: Path) -> int:
    """Return the length in bytes of a regular file, without opening it.

    Raises:
        UserError: if the path is something else or cannot be examined; the caller names the file.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError("no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(getattr(error, "strerror", None) or str(error)) from None
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise UserError(f"it is {_KINDS.get(kind, 'something else')}, not a file")
    return found.st_size


def read_file(path: Path, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; links are followed.

    Raises:
        UserError: with the reason why it cannot be read; the caller names the file.
    """
    require_length(require_regular(path), limit)
    try:
        # O_NONBLOCK: a named pipe may have replaced the file since the check
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            content = file.read(limit + 1)
    except OSError as error:
        raise UserError(error.strerror or str(error)) from None
    require_length(len(content), limit)  # some files grow, and files in /proc report length 0
    return content


def require_length(length: int, limit: int) -> None:
    """Raise UserError if a length exceeds the limit; the caller names the file."""
    if length > limit:
        raise UserError(f"it holds {length} bytes, more than the {limit} that are read")


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file, see `read_file`; here the error names the file."""
    try:
        return read_file(path, limit)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def require_file(path: Path) -> None:
    """Refuse anything but a regular file, for readers that open it themselves and would block on a named pipe.

    Raises:
        UserError: naming it.
    """
    try:
        require_regular(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_text(path: Path, limit: int, kind: str = "text") -> str:
    """Read a regular file of UTF-8 text, see `read_bytes`; `kind` names the expected format in messages.

    Raises:
        UserError: as `read_bytes`, or if it is not UTF-8.
    """
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid {kind} (byte {error.start} is not UTF-8); save it as UTF-8") from None


def parse_json(text: str, where: object, fault: str = ": not valid JSON") -> Any:
    """Parse JSON.

    Args:
        text: JSON.
        where: the file, for messages.
        fault: what follows `where` in the message.

    Raises:
        UserError: naming `where`, if it is not JSON or is nested more than DEEPEST levels deep.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: nested too deep, more than {DEEPEST} levels") from None
    except ValueError as error:
        raise UserError(f"{where}{fault} ({error})") from None
    _check(data, where)
    return data


def parse_yaml(text: str, where: object, fault: str = ": not valid YAML") -> Any:
    """Parse YAML into values that JSON can hold; `fault` follows `where` in the message for invalid YAML.

    Raises:
        UserError: naming `where`, for invalid YAML, more than YAML_LIMIT characters, more than MOST_NODES values with
            aliases expanded, cycles, more than DEEPEST levels, keys that are not text, dates, sets and binary values.
    """
    import yaml

    if len(text) > YAML_LIMIT:
        raise UserError(f"{where}: larger than {YAML_LIMIT >> 10} KiB, which no configuration is")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is not None:
            _check_nodes(node, where)
        data = None if node is None else loader.construct_document(node)
    except UserError:
        raise
    except RecursionError:
        raise UserError(f"{where}: nested too deep, more than {DEEPEST} levels") from None
    except MemoryError:
        raise
    except Exception as error:  # PyYAML's constructors raise nearly any type, e.g. for the date 2001-99-99
        raise UserError(f"{where}{fault}: {error}") from None
    _check(data, where)
    return data


def _check_nodes(node: Any, where: object) -> None:
    """Refuse a YAML graph that is cyclic, too deep, or too large with its aliases expanded; visit each node once."""
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def size(node: Any, depth: int) -> int:
        if id(node) in inside:
            raise UserError(f"{where}: a value holds itself (an alias inside its own anchor); write it out")
        if depth > DEEPEST:
            raise UserError(f"{where}: nested too deep, more than {DEEPEST} levels")
        if id(node) not in sizes:
            inside.add(id(node))
            children = node.value if isinstance(node.value, list) else ()
            parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
            sizes[id(node)] = 1 + sum(size(part, depth + 1) for part in parts)
            inside.discard(id(node))
            if sizes[id(node)] > MOST_NODES:
                raise UserError(f"{where}: more than {MOST_NODES:,} values once its aliases are written out")
        return sizes[id(node)]

    size(node, 0)


def _check(data: Any, where: object) -> None:
    """Refuse data that are too deep or hold values that JSON lacks."""
    waiting = [(data, 0)]
    while waiting:
        value, depth = waiting.pop()
        if depth > DEEPEST:
            raise UserError(f"{where}: nested too deep, more than {DEEPEST} levels")
        if isinstance(value, dict):
            odd = [key for key in value if not isinstance(key, str)]
            if odd:
                raise UserError(f"{where}: the key {odd[0]!r} must be text; put it in quotes")
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, list):
            waiting += [(item, depth + 1) for item in value]
        elif value is not None and not isinstance(value, str | int | float):
            raise UserError(f"{where}: {value!r} is a {type(value).__name__}, which no setting is; put it in quotes")


def brief(value: Any) -> str:
    """Return repr(value), shortened if it is long, for messages of one line."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]} … ({len(text)} characters)"
