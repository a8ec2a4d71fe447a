"""Configurations to and from plain dictionaries: types are strict, unknown keys refused, errors name their field."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..files import to_dict as to_dict
from ..reading import JSON_LIMIT, LINES_LIMIT, brief, parse_json, read_bytes, read_text
from ..registry import Registry
from ..schedules import PRIORS, SCHEDULES, NoiseSchedule, SigmaPrior

T = TypeVar("T")

# abstract class -> its concrete classes by their `kind`
_FAMILIES: dict[type, Registry[Any]] = {NoiseSchedule: SCHEDULES, SigmaPrior: PRIORS}


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build a dataclass from plain data.

    Raises:
        UserError: naming the key and the value, for unknown keys, wrong types and refused values.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where or cls.__name__}: expected a mapping, got {brief(data)}")
    data = dict(data)
    cls = _concrete(cls, data, where)
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(f"{_join(where, key)}: unknown key{_suggest(key, list(fields))}")
    for name, f in fields.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{_join(where, name)} is missing")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()})


def _concrete(cls: type[T], data: dict[str, Any], where: str) -> type[T]:
    """Remove the tag `kind` from a schedule's or prior's data and return the class it names."""
    known: Registry[Any] | dict[str, type]
    if cls in _FAMILIES:
        known = _FAMILIES[cls]
    elif issubclass(cls, tuple(_FAMILIES)):
        own: Any = getattr(cls, "kind", None)
        known = {own: cls}
        data.setdefault("kind", own)
    else:
        return cls  # an ordinary field may be called `kind`
    kind = data.pop("kind", None)
    if not isinstance(kind, str) or kind not in known:
        fault = " is missing" if kind is None else f"={brief(kind)} is unknown"
        raise UserError(f"{_join(where, 'kind')}{fault}; choose one of {', '.join(known)}")
    found: type[T] = known[kind]
    return found


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _suggest(key: object, names: list[str]) -> str:
    near = difflib.get_close_matches(str(key), names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert plain data to the annotated type, or refuse them."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        errors = []
        for option in args:
            try:
                return _convert(option, value, where)
            except UserError as error:
                if isinstance(value, list | tuple) and not str(error).startswith(f"{where}="):
                    raise  # of a list's element: the list itself is of the right kind
                errors.append(str(error).removeprefix(f"{where}={brief(value)} must be "))
        raise UserError(f"{where}={brief(value)} must be {' or '.join(errors)}")
    if origin is typing.Literal:
        if not any(type(value) is type(arg) and value == arg for arg in args):
            raise UserError(f"{where}={brief(value)} must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}={brief(value)} must be a list")
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(inner) != len(value):
            raise UserError(f"{where}={brief(value)} must have {len(inner)} values")
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(f"{where}={brief(value)} must be a mapping")
        return dict(value)
    if hint in _FAMILIES or dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # false for NaN and for integers beyond the largest float
            raise UserError(f"{where}={brief(value)} must be a finite number")
        return float(value)
    if hint is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}={brief(value)} must fit into 64 bits")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        wanted = "null" if hint is types.NoneType else f"of type {hint.__name__}"
        raise UserError(f"{where}={brief(value)} must be {wanted}")
    return value


def override(config: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of a configuration with dotted keys changed, e.g. {"optimizer.lr": 1e-4}.

    A new `kind` of schedule or prior starts from that kind's defaults; other keys may change it in the same call.

    Raises:
        UserError: for keys that do not exist and values of the wrong type.
    """
    data = to_dict(config)
    for dotted, value in sorted(changes.items(), key=lambda change: not change[0].endswith(".kind")):
        node, (*parents, last) = data, dotted.split(".")
        for depth, part in enumerate(parents):
            if not isinstance(node.get(part), dict):
                fault = "has no keys" if part in node else f"is an unknown key{_suggest(part, list(node))}"
                raise UserError(f"{dotted}: {'.'.join(parents[: depth + 1])} {fault}")
            node = node[part]
        if last not in node and "kind" not in node:
            raise UserError(f"{dotted}: unknown key{_suggest(last, list(node))}")
        if last == "kind" and node["kind"] != value and node["kind"] in (*SCHEDULES, *PRIORS):
            node.clear()
        node[last] = to_dict(value)
    return from_dict(type(config), data)


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        UserError: naming the file, if it cannot be read or is not JSON.
    """
    return parse_json(read_text(path, JSON_LIMIT, "JSON"), path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; a missing file is empty, a last line cut off by a kill is ignored.

    Raises:
        UserError: naming the line, if another line is not a JSON object.
    """
    if not path.exists():
        return []
    lines = read_bytes(path, LINES_LIMIT).split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not _whole(line):
            continue  # cut off by a kill
        try:
            record = parse_json(line.decode(), f"{path}: line {number}", " is not JSON")
        except UnicodeDecodeError:
            raise UserError(f"{path}: line {number} is not UTF-8 text") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number}: expected a JSON object, got {brief(record)}")
        records.append(record)
    return records


def _whole(line: bytes) -> bool:
    """Return whether a line without its newline is complete JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
