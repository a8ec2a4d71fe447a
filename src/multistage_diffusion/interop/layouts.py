"""The three published checkpoint layouts, read into and written from one dataclass (`Published`).

score_sde, DPM-Solver (.pth)   {optimizer, model: {name: weight}, ema: {shadow_params: [weight]}, step}
EDM (.pkl)                     {ema: a persistent module}; written as .safetensors: `net.NAME`, `ema.NAME`
latent diffusion (.ckpt)       {state_dict: {model.diffusion_model.NAME, model_ema.NAMEWITHOUTDOTS,
                               first_stage_model.NAME}}

EDM's own files contain source code, which this library neither runs nor writes. Files written here also contain
settings that shapes do not determine (`arguments`), such as stage edges and channels of an attention head.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import UserError
from ..nets.blocks import GROUPS
from ..reading import parse_json
from .names import dotless, is_buffer
from .published import Record, kind_of, read_pickle, read_torch, torch_bytes

ORIGINAL = 32  # largest number of GroupNorm groups in score_sde's and EDM's own code; GROUPS in the multi-stage code

Family = Literal["ncsnpp", "ddpmpp", "ldm"]
Tensors = dict[str, Tensor]

SUFFIXES: dict[str, str] = {"ncsnpp": ".pth", "ddpmpp": ".safetensors", "ldm": ".ckpt"}
_CODE = {
    "ncsnpp": "score_sde's NCSN++ (.pth)",
    "ddpmpp": "EDM's DDPM++ (.pkl)",
    "ldm": "latent diffusion's U-Net (.ckpt)",
}
_FIRST = {
    "ncsnpp": ("en_modules.", "all_modules."),
    "ddpmpp": ("model.map_layer", "model.enc."),
    "ldm": ("time_embed.", "input_blocks."),
}
_GROUPS = "norm_groups"  # key in the arguments of files written here
_UNET, _AVERAGE, _CODEC = "model.diffusion_model.", "model_ema.", "first_stage_model."
# Arguments of EDM's classes that change the output for equal weights, with the values of DDPM++.
DDPMPP = {
    "embedding_type": "positional",
    "encoder_type": "standard",
    "decoder_type": "standard",
    "channel_mult_noise": 1,
    "resample_filter": [1, 1],
}
_DEPTH = 20  # largest nesting depth of modules
_OTHER_PRECONDITIONING = ("VPPrecond", "VEPrecond", "iDDPMPrecond")


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published checkpoint as plain values.

    Attributes:
        family: family of the network.
        model: {published name: weight}, without a wrapper's prefix; None if the file holds only the EMA.
        ema: the EMA weights by the same names; None if there are none.
        codec: first stage of a latent diffusion file, by CompVis' names.
        buffers: other tensors of a latent diffusion file: betas, scale_factor, ...
        arguments: settings of the network in the file.
        norm_groups: a GroupNorm has min(channels // 4, norm_groups) groups; in LDM always 32.
        step: training steps done; written, not read.
    """

    family: Family
    model: Tensors | None
    ema: Tensors | None
    codec: Tensors = field(default_factory=dict)
    buffers: Tensors = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    norm_groups: int = GROUPS
    step: int = 0


def read_published(path: Path) -> Published:
    """Read a published checkpoint to the CPU without running code from it.

    Raises:
        UserError: one line naming the file and its fault: damaged, hostile, of another layout.
    """
    kind = kind_of(path)
    try:
        if kind == "safetensors":
            return _read_safetensors(path)
        if kind == "pickle":
            return _from_edm(_mapping(read_pickle(path), "the pickle"))
        content = _mapping(read_torch(path), "the file")
        if "state_dict" in content:
            return _from_ldm(content)
        if "model" in content:
            return _from_score_sde(content)
        raise UserError(f"has neither 'model' (score_sde) nor 'state_dict' (latent diffusion), but {_listed(content)}")
    except UserError as error:
        text = str(error)
        raise UserError(text if text.startswith(str(path)) else f"{path}: {text}") from None


def published_bytes(published: Published) -> bytes:
    """Return the file content of a checkpoint that has both model and EMA, in the layout of its family."""
    assert published.model is not None
    assert published.ema is not None
    if published.family == "ncsnpp":
        return torch_bytes(_to_score_sde(published, published.model, published.ema))
    if published.family == "ldm":
        return torch_bytes(_to_ldm(published, published.model, published.ema))
    parts = {"net": published.model, "ema": published.ema}
    tensors = {
        f"{part}.{name}": value
        for part, values in parts.items()
        for name, value in (_resample_filters(values) | values).items()
    }
    metadata = {
        "arguments": json.dumps({**published.arguments, _GROUPS: published.norm_groups}),
        "step": str(published.step),
    }
    return save(tensors, metadata)


# --- score_sde and DPM-Solver


def _from_score_sde(content: Mapping[Any, Any]) -> Published:
    tensors = _tensors(content["model"], "model")
    prefix = "module." if all(name.startswith("module.") for name in tensors) else ""
    model = _learnt({name.removeprefix(prefix): value for name, value in tensors.items()})
    _require_family("ncsnpp", model)
    arguments = _plain(content.get("arguments"))
    original = any(name.startswith("all_modules.") for name in model)
    return Published(
        family="ncsnpp",
        model=model,
        ema=_listed_average(content["ema"], model) if content.get("ema") is not None else None,
        norm_groups=_said_groups(arguments, ORIGINAL if original else GROUPS),
        arguments=arguments,
    )


def _listed_average(ema: Any, model: Tensors) -> Tensors:
    """Return the EMA weights by name; the file lists them in the order of the module's state dict."""
    shadow = _mapping(ema, "ema").get("shadow_params")
    if not isinstance(shadow, list) or len(shadow) != len(model):
        count = len(shadow) if isinstance(shadow, list) else "no"
        raise UserError(f"ema.shadow_params: {count} tensors for the model's {len(model)}")
    average = _tensors(dict(zip(model, shadow, strict=True)), "ema.shadow_params")
    for name, value in average.items():
        if value.shape != model[name].shape:
            raise UserError(
                f"ema.shadow_params: the tensor in the place of {name} is {list(value.shape)}, not "
                f"{list(model[name].shape)}"
            )
    return average


def _to_score_sde(published: Published, model: Tensors, ema: Tensors) -> dict[str, Any]:
    # score_sde also restores an optimizer, so write a new Adam state for the same number of parameters
    group = {"lr": 2e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0, "amsgrad": False}
    return {
        "optimizer": {"state": {}, "param_groups": [{**group, "params": list(range(len(model)))}]},
        "model": {"module.sigmas": _score_sde_sigmas()} | {f"module.{name}": value for name, value in model.items()},
        "ema": {"decay": 0.9999, "num_updates": published.step, "shadow_params": [ema[name] for name in model]},
        "step": published.step,
        "arguments": {**published.arguments, _GROUPS: published.norm_groups},
    }


def _score_sde_sigmas() -> Tensor:
    """Return the noise levels in the buffer of score_sde's networks; VP networks do not use them."""
    return torch.linspace(math.log(50.0), math.log(0.01), 1000, dtype=torch.float64).exp()


# --- EDM


def _from_edm(content: Mapping[Any, Any]) -> Published:
    record = content.get("ema")
    if not isinstance(record, Record):
        raise UserError(f"has no averaged network under 'ema', but {_listed(content)}")
    if record.name in _OTHER_PRECONDITIONING:
        raise UserError(f"holds a {record.name}; of EDM's networks only those preconditioned as EDMPrecond are read")
    groups: dict[str, int] = {}
    tensors = _learnt(dict(_module_tensors(record, "", set(), groups)))
    _require_family("ddpmpp", tensors)
    widths = {name: len(tensors[f"{name}.weight"]) for name in groups if f"{name}.weight" in tensors}
    most = max((GROUPS, *(groups[name] for name in widths)))  # a small network may have fewer in all layers
    odd = [name for name, width in widths.items() if groups[name] != min(width // 4, most)]
    if odd:
        raise UserError(
            f"{odd[0]} normalises {widths[odd[0]]} channels in {groups[odd[0]]} groups, others in up to {most}"
        )
    return Published(family="ddpmpp", model=None, ema=tensors, arguments=_edm_arguments(record), norm_groups=most)


def _edm_arguments(record: Record) -> dict[str, Any]:
    """Return the constructor arguments of a network and of its preconditioning module."""
    state = _mapping(record.state, "ema")
    inner = _mapping(state.get("_modules", {}), "ema._modules").get("model")
    parts = [_mapping(inner.state, "ema.model") if isinstance(inner, Record) else {}, state]
    given = {name: value for part in parts for name, value in _mapping(part.get("_init_kwargs", {}), "kwargs").items()}
    return _checked(given | {name: state[name] for name in ("sigma_data",) if name in state})


def _module_tensors(record: Any, where: str, seen: set[int], groups: dict[str, int]) -> Iterator[tuple[str, Tensor]]:
    """Yield a module's parameters and buffers by dotted name; store the group counts of GroupNorms in `groups`."""
    if not isinstance(record, Record) or id(record) in seen or where.count(".") > _DEPTH:
        raise UserError(f"ema.{where[:80]}: is no module, one found twice, or one too deep inside others")
    seen.add(id(record))
    state = _mapping(record.state, f"ema.{where}")
    prefix = f"{where}." if where else ""
    for kind in ("_parameters", "_buffers"):
        held = _mapping(state.get(kind, {}), f"ema.{prefix}{kind}")
        yield from _tensors({k: v for k, v in held.items() if v is not None}, f"ema.{prefix}{kind}", prefix).items()
    if type(state.get("num_groups")) is int:
        groups[where] = state["num_groups"]
    for name, child in _mapping(state.get("_modules", {}), f"ema.{prefix}_modules").items():
        if child is not None:
            yield from _module_tensors(child, f"{prefix}{name}", seen, groups)


def _checked(given: Mapping[Any, Any]) -> dict[str, Any]:
    arguments = _plain(given)
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


def _read_safetensors(path: Path) -> Published:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"is truncated or damaged ({error})") from None
    parts: dict[str, Tensors] = {"net": {}, "ema": {}}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        if part not in parts:
            raise UserError(f"{name}: is neither net.NAME nor ema.NAME, as msdiff export writes EDM's networks")
        parts[part][rest] = value
    parts = {part: _learnt(values) for part, values in parts.items()}
    _require_family("ddpmpp", parts["net"] or parts["ema"])
    try:
        arguments = _plain(parse_json(metadata.get("arguments", "{}"), "metadata"))
    except UserError:
        raise UserError("its metadata are not those of msdiff export") from None
    groups = _said_groups(arguments, GROUPS)
    return Published(
        family="ddpmpp",
        model=parts["net"] or None,
        ema=parts["ema"] or None,
        arguments=_checked(arguments),
        norm_groups=groups,
    )


# --- latent diffusion


def _from_ldm(content: Mapping[Any, Any]) -> Published:
    tensors = _tensors(content["state_dict"], "state_dict")
    model = _under(tensors, _UNET)
    if not model:
        raise UserError(f"state_dict holds no U-Net ({_UNET}*), but {_listed(tensors)}")
    _require_family("ldm", model)
    average = _under(tensors, _AVERAGE)
    return Published(
        family="ldm",
        model=model,
        ema=_dotless_average(average, model) if average else None,
        codec=_under(tensors, _CODEC),
        buffers={
            name: value
            for name, value in tensors.items()
            if not name.startswith((_UNET, _AVERAGE, _CODEC))  # betas, scale_factor, ...
        },
        arguments=_plain(content.get("hyper_parameters")),
    )


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _dotless_average(average: Tensors, model: Tensors) -> Tensors:
    full = {dotless(name): name for name in model}
    left = [name for name in average if name not in full and name not in ("decay", "num_updates")]
    missing = [name for short, name in full.items() if short not in average]
    if left or missing:
        what = f"{left[0]} averages no weight of the U-Net" if left else f"no average of {missing[0]}"
        raise UserError(f"model_ema: {what} ({len(left)} too many, {len(missing)} missing)")
    return {name: average[short] for short, name in full.items()}


def _to_ldm(published: Published, model: Tensors, ema: Tensors) -> dict[str, Any]:
    average = {"decay": torch.tensor(0.9999), "num_updates": torch.tensor(published.step, dtype=torch.int32)}
    average |= {dotless(name): value for name, value in ema.items()}
    assert len(average) == len(ema) + 2, "two names are the same without their dots"
    state = {f"{_UNET}{name}": value for name, value in model.items()}
    state |= {f"{_AVERAGE}{name}": value for name, value in average.items()}
    state |= {f"{_CODEC}{name}": value for name, value in published.codec.items()}
    return {
        "global_step": published.step,
        "state_dict": published.buffers | state,
        "hyper_parameters": published.arguments,
    }


# --- shared


def _mapping(value: Any, what: str) -> Mapping[Any, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{what}: is a {type(value).__name__}, not a dictionary")
    return value


def _tensors(value: Any, what: str, prefix: str = "") -> Tensors:
    """Check and return a dictionary of tensors, with a prefix added to each name."""
    tensors = _mapping(value, what)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UserError(f"{what}: {str(name)[:80]!r} is a {type(tensor).__name__}, not a tensor")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{what}: {name!r} does not hold all of its {tensor.numel()} numbers")
    return {f"{prefix}{name}": tensor.detach() for name, tensor in tensors.items()}


def _said_groups(arguments: dict[str, Any], default: int) -> int:
    """Remove the largest number of GroupNorm groups from a file's arguments and return it."""
    said = arguments.pop(_GROUPS, default)
    return said if type(said) is int and said > 0 else default


def _learnt(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if not is_buffer(name)}


def _require_family(family: Family, names: Mapping[str, Tensor]) -> None:
    """Raise UserError unless there are tensors of the family; the message names the family found."""
    found = [f for f, first in _FIRST.items() if any(name.startswith(first) for name in names)]
    if family not in found:
        first = next(iter(names), "nothing")
        whose = f"that of {_CODE[found[0]]}" if found else "of unknown code"
        raise UserError(f"this layout is that of {_CODE[family]}, but its first tensor, {first}, is {whose}")


def _plain(value: Any) -> dict[str, Any]:
    """Return the entries of a dictionary that are None, numbers, text or lists of these; {} for any other value."""
    plain: dict[str, Any] = {}
    for key, entry in value.items() if isinstance(value, dict) else ():
        entry = list(entry) if isinstance(entry, tuple) else entry
        if isinstance(key, str) and (all(map(_simple, entry)) if isinstance(entry, list) else _simple(entry)):
            plain[key] = entry
    return plain


def _simple(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _listed(content: Mapping[Any, Any]) -> str:
    return ", ".join(map(repr, list(content)[:8])) or "nothing"
