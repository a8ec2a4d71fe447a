"""EDM's layouts: its pickles, which are read without their source, and the .safetensors that is written instead."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from ..nets.blocks import GROUPS
from ..reading import brief, parse_json
from .parts import EDGES, Published, Tensors, learnt, listed, mapping, plain, require_family, said_groups, tensors
from .published import Record

# Arguments of EDM's classes that change the output for equal weights, with the values of DDPM++.
DDPMPP = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
STAGE_INTERVAL = "stage_interval"  # of the multi-stage code's network
_DEPTH = 20  # largest nesting depth of modules
_PRECONDITIONING = "EDMPrecond"
_OTHER_NETWORKS = {"DhariwalUNet": "ADM"}
_OURS = "msdiff"  # key of the metadata with what exports add


def read_edm_pickle(content: Mapping[Any, Any]) -> Published:
    """Read the content of an EDM pickle.

    Raises:
        UserError: if it holds no averaged network, or one of another kind.
    """
    record = content.get("ema")
    if not isinstance(record, Record):
        raise UserError(f"has no averaged network under 'ema', but {listed(content)}")
    if record.name != _PRECONDITIONING:
        raise UserError(
            f"holds a {brief(record.name)}; of EDM's networks only those preconditioned as EDMPrecond are read"
        )
    arguments = _pickled_arguments(record)
    groups: dict[str, int] = {}
    found = learnt(dict(_module_tensors(record, "", set(), groups)))
    require_family("ddpmpp", found)
    widths = {name: len(found[f"{name}.weight"]) for name in groups if f"{name}.weight" in found}
    most = max((GROUPS, *(groups[name] for name in widths)))  # a small network may have fewer in all layers
    odd = [name for name, width in widths.items() if groups[name] != min(width // 4, most)]
    if odd:
        raise UserError(
            f"{odd[0]} normalises {widths[odd[0]]} channels in {groups[odd[0]]} groups, others in up to {most}"
        )
    return Published(
        family="ddpmpp",
        model=None,
        ema=found,
        arguments=arguments,
        norm_groups=most,
        norm_groups_known=bool(groups),
    )


def _pickled_arguments(record: Record) -> dict[str, Any]:
    """Return the constructor arguments of a network and of its preconditioning module, and the edges between stages."""
    state = mapping(record.state, "ema")
    inner = mapping(state.get("_modules", {}), "ema._modules").get("model")
    name = inner.name if isinstance(inner, Record) else ""
    inside = mapping(inner.state, "ema.model") if isinstance(inner, Record) else {}
    given = {
        name: value
        for part in (inside, state)
        for name, value in mapping(part.get("_init_kwargs", {}), "kwargs").items()
    }
    _require_network(name)
    _require_network(given.get("model_type", ""))
    # the attribute is what the network's forward pass reads; the argument may be its class's default
    intervals = inside.get(STAGE_INTERVAL, given.get(STAGE_INTERVAL))
    edges = {} if intervals is None else {EDGES: interval_edges(intervals)}
    return checked(given | {name: state[name] for name in ("sigma_data",) if name in state}) | edges


def _require_network(name: Any) -> None:
    if name in _OTHER_NETWORKS:
        raise UserError(f"holds a {name} ({_OTHER_NETWORKS[name]}); of EDM's networks only DDPM++ is read")


def interval_edges(intervals: Any) -> list[float]:
    """Return the edges of the multi-stage code's stage_interval, one list of [low, high] in sigma for each stage.

    Raises:
        UserError: if a stage is a union of intervals, or they do not follow one another.
    """
    stages = list(intervals) if isinstance(intervals, list | tuple) else []
    for k, stage in enumerate(stages, start=1):
        if isinstance(stage, list | tuple) and len(stage) > 1:
            raise UserError(
                f"{STAGE_INTERVAL}: stage {k} is a union of {len(stage)} intervals; only stages of one interval are read"
            )
    ends = [_ends(stage) for stage in stages]
    if not ends or not all(ends):
        raise UserError(f"{STAGE_INTERVAL}={intervals!r:.80} is no list of [[low, high]], one for each stage")
    pairs = [pair for pair in ends if pair is not None]
    for k, ((_, high), (low, _)) in enumerate(itertools.pairwise(pairs), start=1):
        if not math.isclose(high, low, rel_tol=1e-6):
            raise UserError(
                f"{STAGE_INTERVAL}: stage {k} ends at {high:g} but stage {k + 1} begins at {low:g}; only stages that "
                "follow one another, lowest noise first, are read"
            )
    return [low for low, _ in pairs[1:]]


def _ends(stage: Any) -> tuple[float, float] | None:
    """Return low and high of [[low, high]]; None for anything else."""
    pair = stage[0] if isinstance(stage, list | tuple) and len(stage) == 1 else None
    if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(end) in (int, float) for end in pair):
        return None
    low, high = map(float, pair)
    return (low, high) if 0 <= low < high else None


def _module_tensors(record: Any, where: str, seen: set[int], groups: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's parameters and buffers by dotted name; store the group counts of GroupNorms in `groups`."""
    if not isinstance(record, Record) or id(record) in seen or where.count(".") > _DEPTH:
        raise UserError(f"ema.{where[:80]}: is no module, one found twice, or one too deep inside others")
    seen.add(id(record))
    state = mapping(record.state, f"ema.{where}")
    prefix = f"{where}." if where else ""
    for kind in ("_parameters", "_buffers"):
        held = mapping(state.get(kind, {}), f"ema.{prefix}{kind}")
        yield from tensors({k: v for k, v in held.items() if v is not None}, f"ema.{prefix}{kind}", prefix).items()
    if type(state.get("num_groups")) is int:
        groups[where] = state["num_groups"]
    for name, child in mapping(state.get("_modules", {}), f"ema.{prefix}_modules").items():
        if child is not None:
            yield from _module_tensors(child, f"{prefix}{name}", seen, groups)


def checked(given: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the plain arguments of EDM's classes, after checking that they are DDPM++'s."""
    arguments = plain(given)
    for name, value in DDPMPP.items():
        if name in given and arguments.get(name) != value:
            said = repr(arguments[name]) if name in arguments else f"a {type(given[name]).__name__}"
            raise UserError(f"{name}={said} is not DDPM++'s {value!r}; only that network is read")
    return arguments


def _resample_filters(model: Tensors) -> Tensors:
    """Return the filter buffers of EDM's resampling convolutions: the outer product of [1, 1] with sum 1."""
    resampling = (n for n in model if n.split(".")[-3].endswith(("_up", "_down")))
    names = (n.removesuffix("weight") for n in resampling if n.endswith(("conv0.weight", "skip.weight")))
    return {f"{name}resample_filter": torch.full((1, 1, 2, 2), 0.25) for name in names}


def edm_bytes(published: Published, model: Tensors, ema: Tensors) -> bytes:
    """Return a .safetensors file with EDM's names, the arguments of its constructor, and our settings apart from them."""
    found = {
        f"{part}.{name}": value
        for part, values in {"net": model, "ema": ema}.items()
        for name, value in (_resample_filters(values) | values).items()
    }
    metadata = {
        "arguments": json.dumps(published.arguments),
        _OURS: json.dumps(published.written_settings()),
        "step": str(published.step),
    }
    return save(found, metadata)


def read_edm_safetensors(path: Path) -> Published:
    """Read what `edm_bytes` wrote.

    Raises:
        UserError: if it is damaged, or another kind of .safetensors.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"is truncated or damaged ({error})") from None
    parts: dict[str, Tensors] = {"net": {}, "ema": {}}
    for name, value in found.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"{name}: is neither net.NAME nor ema.NAME, as msdiff export writes EDM's networks")
        parts[part][rest] = value
    parts = {part: learnt(values) for part, values in parts.items()}
    require_family("ddpmpp", parts["net"] or parts["ema"])
    try:
        theirs, ours = (parse_json(metadata.get(key, "{}"), "metadata") for key in ("arguments", _OURS))
    except UserError:
        raise UserError("its metadata are not those of msdiff export") from None
    arguments = checked(theirs if isinstance(theirs, dict) else {}) | plain(ours)
    groups = said_groups(arguments)
    intervals = theirs.get(STAGE_INTERVAL) if isinstance(theirs, dict) else None
    if intervals is not None and EDGES not in arguments:
        arguments[EDGES] = interval_edges(intervals)
    return Published(
        family="ddpmpp",
        model=parts["net"] or None,
        ema=parts["ema"] or None,
        arguments=arguments,
        norm_groups=groups or GROUPS,
        norm_groups_known=groups is not None,
    )
