"""Text files of others, read within bounds: regular files of a stated size, JSON and YAML of a stated depth and extent."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from .errors import UserError

JSON_LIMIT = 256 << 20  # bytes
LINES_LIMIT = 1 << 30  # bytes of a log of a long run
YAML_LIMIT = 256 << 10  # bytes; PyYAML reads about 100 KiB/s
DEEPEST = 64  # levels of lists and mappings
MOST_NODES = 100_000  # values of a YAML text, aliases written out


def read_bytes(path: Path, limit: int) -> bytes:
    """Read a regular file.

    Args:
        path: of the file; links are followed.
        limit: bytes that it may have.

    Raises:
        UserError: naming it, if it is missing, special (a folder, a FIFO, a device), cannot be read or is larger.
    """
    try:
        # a FIFO that nobody writes to would be waited for
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(handle, "rb") as file:
            found = os.fstat(handle)
            if not stat.S_ISREG(found.st_mode):
                kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a FIFO, socket or device"
                raise UserError(f"{path}: is {kind}, not a file")
            data = file.read(limit + 1) if found.st_size <= limit else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: cannot be read (is a directory)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if data is None or len(data) > limit:
        raise UserError(f"{path}: larger than {limit >> 10} KiB, which no file of this kind is; name another")
    return data


def require_file(path: Path) -> None:
    """Refuse what is no regular file, for readers that open it themselves and would wait for a FIFO.

    Raises:
        UserError: naming it.
    """
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is {'a folder' if stat.S_ISDIR(mode) else 'a FIFO, socket or device'}, not a file")


def read_text(path: Path, limit: int, kind: str = "text") -> str:
    """Read a regular file of UTF-8 text, see `read_bytes`; `kind` is what it should be, for messages.

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
        fault: what follows it in the message.

    Raises:
        UserError: naming where, if it is not JSON or nested more than DEEPEST deep.
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
    """Parse YAML into what JSON could hold, too; `fault` follows `where` in the message for what is not YAML.

    Raises:
        UserError: naming where, for what is not YAML, for more than MOST_NODES values with aliases written out, cycles, more
            than DEEPEST levels, keys that are not text, and dates, sets and binary values.
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
    except Exception as error:  # PyYAML's constructors raise nearly every kind, e.g. for the date 2001-99-99
        raise UserError(f"{where}{fault}: {error}") from None
    _check(data, where)
    return data


def _check_nodes(node: Any, where: object) -> None:
    """Refuse a YAML graph that is cyclic, deep, or large once its aliases are written out; each node is visited once."""
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
    """Refuse what is deep, or what JSON does not hold."""
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
    """Return repr(value), cut where it is long: a message is one line that can be read."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:160]} … ({len(text)} characters)"
