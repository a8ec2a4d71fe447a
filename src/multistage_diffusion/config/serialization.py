"""Configurations to and from plain dictionaries: types are strict, unknown keys refused, errors name their field."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import sys
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import UserError
from ..files import to_dict as to_dict
from ..reading import JSON_LIMIT, LINES_LIMIT, brief, parse_json, read_bytes, read_text
from ..registry import Registry
from ..schedules import PRIORS, SCHEDULES, NoiseSchedule, SigmaPrior
from .network import DEFAULT_FAMILY, FAMILIES, NetworkConfig

T = TypeVar("T")

# types in the words of an error
_KINDS = {types.NoneType: "null", int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class _Choice:
    """How data name the concrete class of an abstract one.

    Attributes:
        key: the key of the data that names it; the class attribute of the same name is its value.
        known: the concrete classes by name.
        keeps: whether a changed choice keeps the values of keys that both classes have (`override`).
        default: the name if the key is missing; empty: it must be there.
    """

    key: str
    known: Mapping[str, type] | Registry[Any]
    keeps: bool = False
    default: str = ""


_CHOICES: dict[type, _Choice] = {
    NoiseSchedule: _Choice("kind", SCHEDULES),
    SigmaPrior: _Choice("kind", PRIORS),
    NetworkConfig: _Choice("family", FAMILIES, keeps=True, default=DEFAULT_FAMILY),
}


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build a dataclass from plain data.

    Raises:
        UserError: naming the key and the value, for unknown keys, wrong types and refused values.
    """
    if not isinstance(data, Mapping):
        raise UserError(f"{where or cls.__name__}: expected a mapping, got {brief(data)}")
    data = dict(data)
    cls = _concrete(cls, data, where)
    hints = _type_hints(cls)  # type: ignore[arg-type]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    for key in data:
        if key not in fields:
            raise UserError(f"{_join(where, key)}: unknown key{_stranger(key, cls) or _suggest(key, list(fields))}")
    for name, f in fields.items():
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{_join(where, name)} is missing")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()})


@functools.cache
def _type_hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)  # evaluates strings: slow, and the same every time


def _choice(cls: type) -> _Choice | None:
    """Return how data choose a class that is one of several."""
    return next((choice for base, choice in _CHOICES.items() if issubclass(cls, base)), None)


def _concrete(cls: type[T], data: dict[str, Any], where: str) -> type[T]:
    """Remove the key that names a concrete class from data, and return that class."""
    choice = _choice(cls)
    if choice is None:
        return cls  # an ordinary field may have the same name
    name, known = choice.default, choice.known
    if cls not in _CHOICES:
        name = getattr(cls, choice.key)
        known = {name: cls}
    name = data.pop(choice.key, name or None)
    if not isinstance(name, str) or name not in known:
        fault = " is missing" if name is None else f"={brief(name)} is unknown"
        raise UserError(f"{_join(where, choice.key)}{fault}; choose one of {', '.join(known)}")
    found: type[T] = known[name]
    return found


def _stranger(key: object, cls: type) -> str:
    """Say which classes of the same choice have a key that a class has not; empty if none has."""
    choice = _choice(cls)
    if choice is None:
        return ""
    owners = [name for name in choice.known if key in {f.name for f in dataclasses.fields(choice.known[name])}]
    own = getattr(cls, choice.key)
    return f" of {choice.key} {own!r}; it is a setting of {', '.join(owners)}" if owners else ""


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
    if hint in _CHOICES or dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= sys.float_info.max:  # false for NaN and for integers beyond the largest float
            raise UserError(f"{where}={brief(value)} must be a finite number")
        return float(value)
    if hint is int and type(value) is int and not -(2**63) <= value < 2**63:
        raise UserError(f"{where}={brief(value)} must fit into 64 bits")
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        wanted = _KINDS.get(hint, f"of type {getattr(hint, '__name__', hint)}")
        raise UserError(f"{where}={brief(value)} must be {wanted}")
    return value


def override(config: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of a configuration with dotted keys changed, e.g. {"optimizer.lr": 1e-4}.

    A new kind of schedule or prior starts from that kind's defaults. A new family of networks keeps the settings that both
    families have and starts from its defaults for the others. Other keys may change them in the same call, in any order; of a
    part as a whole and its keys the later wins.

    Raises:
        UserError: for keys that do not exist and values of the wrong type.
    """
    return from_dict(type(config), changed(config, changes))


def changed(config: object, changes: Mapping[str, Any]) -> Any:
    """Return the plain data of a configuration with dotted keys changed, see `override`; values are not checked.

    Raises:
        UserError: for keys that do not exist.
    """
    data, keys = to_dict(config), {choice.key for choice in _CHOICES.values()}
    partial = set[str]()  # parts given as a whole, which need not name all their keys
    for dotted, value in _later_wins(changes, keys):
        node, (*parents, last) = data, dotted.split(".")
        kind: Any = type(config)
        for depth, part in enumerate(parents):
            cls = _named(kind, node)
            _set_default(cls, node, part)
            if not isinstance(node.get(part), dict):
                fault = "has no keys" if part in node else f"is an unknown key{_unknown(part, cls, node)}"
                raise UserError(f"{dotted}: {'.'.join(parents[: depth + 1])} {fault}")
            node, kind = node[part], _type_hints(cls).get(part) if cls else None
        if last not in node and ".".join(parents) not in partial and not keys & node.keys():
            raise UserError(f"{dotted}: unknown key{_suggest(last, list(node))}")
        _keep_common(node, last, value)
        node[last] = to_dict(value)
        if isinstance(value, Mapping):
            partial.add(dotted)
    return data


def _named(hint: Any, node: Mapping[str, Any]) -> type | None:
    """Return the dataclass that plain data are of, from the annotation of their field; None if they are of none."""
    choice = _CHOICES.get(hint)
    if choice is not None:
        name = node.get(choice.key, choice.default)
        hint = choice.known[name] if isinstance(name, str) and name in choice.known else None
    return hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None


def _set_default(cls: type | None, node: dict[str, Any], key: str) -> None:
    """Give plain data of a class the default of a part that they do not name, so that keys of the part can be changed."""
    for field in () if cls is None or key in node else dataclasses.fields(cls):
        if field.name == key and field.default_factory is not dataclasses.MISSING:
            node[key] = to_dict(field.default_factory())
        elif field.name == key and field.default is not dataclasses.MISSING:
            node[key] = to_dict(field.default)


def _unknown(key: str, cls: type | None, node: Mapping[str, Any]) -> str:
    """Say to what class a key belongs that these data have not, or which keys they have."""
    if cls is None:
        return _suggest(key, list(node))
    return _stranger(key, cls) or _suggest(key, [field.name for field in dataclasses.fields(cls) if field.init])


def _later_wins(changes: Mapping[str, Any], keys: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield changes so that a later one wins: a part given as a whole before its keys, but after those given earlier.

    Args:
        changes: values by dotted key, in the order in which they were given.
        keys: that choose a class; they come before the keys beside them, which belong to the class.
    """
    parts: list[dict[str, Any]] = [{}]
    for dotted, value in changes.items():
        if any(earlier.startswith(f"{dotted}.") for earlier in parts[-1]):
            parts.append({})
        parts[-1][dotted] = value
    for part in parts:
        yield from sorted(part.items(), key=lambda c: (c[0].count("."), c[0].rpartition(".")[2] not in keys))


def _keep_common(node: dict[str, Any], key: str, value: Any) -> None:
    """Remove from the data of a class what does not hold for the class that a key is about to choose."""
    for choice in _CHOICES.values():
        if key == choice.key and node.get(key) in choice.known and node[key] != value:
            common: set[str] = set()
            if choice.keeps and isinstance(value, str) and value in choice.known:
                common = {f.name for f in dataclasses.fields(choice.known[value])}
            for name in node.keys() - common:
                del node[name]
            return


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
