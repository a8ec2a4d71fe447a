"""Configurations to and from plain dictionaries: strict types, unknown keys refused, every error names its field."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import tempfile
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .schedules import PRIORS, SCHEDULES, NoiseSchedule, SigmaPrior

T = TypeVar("T")

# abstract class -> its concrete classes by their `kind`
_FAMILIES: dict[type, Mapping[str, type]] = {NoiseSchedule: SCHEDULES, SigmaPrior: PRIORS}


def to_dict(value: Any) -> Any:
    """Return value as JSON-able data; a schedule or prior carries its `kind`."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        data = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
        kind = getattr(value, "kind", None)
        return {"kind": kind, **data} if isinstance(kind, str) else data
    if isinstance(value, tuple | list):
        return [to_dict(v) for v in value]
    if isinstance(value, dict):
        return {k: to_dict(v) for k, v in value.items()}
    return value


def from_dict(cls: type[T], data: Any, where: str = "") -> T:
    """Build a dataclass from plain data.

    Raises:
        ValueError: naming the key and the value, for unknown keys, wrong types and refused values.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{where or cls.__name__}: expected a mapping, got {data!r}")
    data = dict(data)
    if cls in _FAMILIES:
        known = _FAMILIES[cls]
        kind = data.pop("kind", None)
        if kind not in known:
            raise ValueError(f"{_join(where, 'kind')}={kind!r} is unknown; choose one of {', '.join(known)}")
        cls = known[kind]
    else:
        data.pop("kind", None) if hasattr(cls, "kind") else None
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            raise ValueError(f"{_join(where, key)}: unknown key{_suggest(key, names)}")
    return cls(**{key: _convert(hints[key], value, _join(where, key)) for key, value in data.items()})


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _suggest(key: str, names: list[str]) -> str:
    near = difflib.get_close_matches(key, names, 1)
    return f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Convert plain data to the annotated type or refuse it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (types.UnionType, typing.Union):
        errors = []
        for option in args:
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(str(error))
        raise ValueError(errors[0])
    if origin is typing.Literal:
        if value not in args:
            raise ValueError(f"{where}={value!r} must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where}={value!r} must be a list")
        inner = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(inner) != len(value):
            raise ValueError(f"{where}={value!r} must have {len(inner)} values")
        return tuple(_convert(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(inner, value, strict=True)))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}={value!r} must be a mapping")
        return dict(value)
    if hint in _FAMILIES or dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else from_dict(hint, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is type(None):
        hint = types.NoneType
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where}={value!r} must be of type {hint.__name__}")
    return value


def override(config: T, changes: Mapping[str, Any]) -> T:
    """Return a copy of a configuration with dotted keys changed, e.g. {"optimizer.lr": 1e-4}.

    Raises:
        ValueError: for keys that do not exist and values of the wrong type.
    """
    data = to_dict(config)
    for dotted, value in changes.items():
        node = data
        *parents, last = dotted.split(".")
        for depth, part in enumerate(parents):
            if not isinstance(node.get(part), dict):
                raise ValueError(
                    f"{dotted}: unknown key {'.'.join(parents[: depth + 1])!r}{_suggest(part, list(node))}"
                )
            node = node[part]
        if last not in node and "kind" not in node:
            raise ValueError(f"{dotted}: unknown key{_suggest(last, list(node))}")
        node[last] = value
    return from_dict(type(config), data)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a file so that it is either wholly there or as it was before: temporary name, fsync, rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_atomic(path, (json.dumps(to_dict(value), indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        ValueError: if the file is missing or is not JSON, naming it.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
