"""Reads the record files of a run and checks the type of every field that is used."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config.serialization import read_json, read_lines
from .errors import UserError
from .reading import brief


@dataclass(frozen=True)
class Kind:
    """A kind of value: its description and its test."""

    words: str
    fits: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and (value != value or _finite(value))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
WHOLE = Kind("a whole number from 0 to 2^63", lambda value: type(value) is int and 0 <= value < 2**63)
FINITE = Kind("a finite number", _finite)
FOUND = Kind(
    "a number", lambda value: _number(value) or value in (float("inf"), float("-inf"))
)  # a measured value may be NaN or inf


def maybe(kind: Kind) -> Kind:
    """Return a kind that also accepts null."""
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


def listed(kind: Kind) -> Kind:
    """Return the kind of lists whose items are of a kind."""
    return Kind(f"a list, each {kind.words}", lambda value: isinstance(value, list) and all(map(kind.fits, value)))


def named(kind: Kind) -> Kind:
    """Return the kind of mappings from names to values of a kind."""
    return Kind(
        f"a mapping to values, each {kind.words}",
        lambda value: isinstance(value, dict) and all(map(kind.fits, value.values())),
    )


Fields = Mapping[str, Kind]

_LINE: Fields = {"kind": TEXT, "step": WHOLE}
_METRICS: dict[str, Fields] = {
    "train": {
        "images": WHOLE,
        "loss": listed(maybe(FOUND)),
        "grad_norm": named(FOUND),
        "lr": FINITE,
        "images_per_s": FINITE,
        "seconds": FINITE,
    },
    "held_out": {"images": WHOLE, "loss": listed(maybe(FOUND))},
    "quality": {
        "images": WHOLE,
        "petaflops": FINITE,
        "frechet": maybe(FINITE),
        "extractor": TEXT,
        "count": WHOLE,
        "reference": TEXT,
    },
}
_METRICS_MORE: dict[str, Fields] = {"quality": {"metrics": named(FINITE)}}
_LAUNCH: Fields = {"time": TEXT, "command": TEXT, "device": TEXT}
_LAUNCH_MORE: Fields = {"version": TEXT, "torch": TEXT}


def read_metrics(path: Path, stages: int | None = None) -> list[dict[str, Any]]:
    """Read metrics.jsonl; a missing file is empty, and a last line cut off by a kill is left out.

    Args:
        path: the file.
        stages: number of stages of the run, each with a loss; None: check only what a trainer reads of its own log.

    Raises:
        UserError: naming file, line, field and value, if a field has another type than when it was written.
    """
    records = read_lines(path)
    for number, record in enumerate(records, start=1):
        where = f"{path}: line {number}"
        check(record, _LINE, where)
        fields = _METRICS.get(record["kind"], {})
        if stages is None:
            check(record, {name: kind for name, kind in fields.items() if name == "frechet"}, where)
            continue
        check(record, fields, where)
        check(record, _METRICS_MORE.get(record["kind"], {}), where, optional=True)
        if record["kind"] in ("train", "held_out") and len(record["loss"]) != stages:
            raise UserError(f"{where}: loss={brief(record['loss'])} must hold {stages} numbers, one for each stage")
    return records


def read_launches(path: Path) -> list[dict[str, Any]]:
    """Read launches.jsonl; a missing file is empty, and a last line cut off by a kill is left out.

    Raises:
        UserError: as `read_metrics`.
    """
    records = read_lines(path)
    for number, record in enumerate(records, start=1):
        check(record, _LAUNCH, f"{path}: line {number}")
        check(record, _LAUNCH_MORE, f"{path}: line {number}", optional=True)
    return records


def read_evaluations(path: Path) -> list[Any]:
    """Read evaluation.json, a list of JSON objects; a missing file is empty.

    The code that shows the objects checks their content.

    Raises:
        UserError: naming the file, if it holds something else.
    """
    data = read_json(path) if path.exists() else []
    if not isinstance(data, list) or not all(isinstance(entry, dict) for entry in data):
        raise UserError(f"{path}: expected a list of results, got {brief(data)}; move it away and evaluate again")
    return data


def check(record: Mapping[str, Any], fields: Fields, where: str, *, optional: bool = False, mend: str = "") -> None:
    """Refuse a record in which a field is missing or of the wrong kind.

    Args:
        record: a JSON object.
        fields: kinds by field name.
        where: file and line, for messages.
        optional: whether fields may be missing.
        mend: text at the end of messages.

    Raises:
        UserError: naming `where`, field and value.
    """
    for name, kind in fields.items():
        if name not in record:
            if not optional:
                raise UserError(f"{where}: {name} is missing{mend}")
        elif not kind.fits(record[name]):
            raise UserError(f"{where}: {name}={brief(record[name])} must be {kind.words}{mend}")


def fields_of(cls: type, without: Sequence[str] = ()) -> tuple[dict[str, Kind], dict[str, Kind]]:
    """Return the kinds of a dataclass's plain fields: those that are required, and those that have a default."""
    hints = typing.get_type_hints(cls)
    needed: dict[str, Kind] = {}
    more: dict[str, Kind] = {}
    for field in dataclasses.fields(cls):
        if field.name not in without:
            group = needed if field.default is dataclasses.MISSING else more
            group[field.name] = _kind(hints[field.name])
    return needed, more


def _kind(hint: Any) -> Kind:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        (inner,) = (arg for arg in typing.get_args(hint) if arg is not types.NoneType)
        return maybe(_kind(inner))
    kinds: dict[Any, Kind] = {str: TEXT, bool: FLAG, int: WHOLE, float: FINITE}
    return kinds[hint]
