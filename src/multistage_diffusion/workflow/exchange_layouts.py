"""Import and export of one-stage networks in the layouts that families bring along (`nets.layouts.LAYOUTS`)."""

from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ..config import CodecConfig, DataConfig, NetworkConfig, RunConfig
from ..config.serialization import override, read_json, to_dict
from ..errors import UserError, require
from ..files import write_atomic
from ..interop.diffusers_folder import CONFIG, OLD_WEIGHTS, WEIGHTS, beside_transformer, read_mapping, read_weights
from ..interop.file_terms import file_terms
from ..interop.parts import SAMPLING, plain, weight
from ..interop.pipeline_index import read_index
from ..interop.published import kind_of, read_torch, torch_bytes
from ..interop.shapes import require_tensors
from ..nets.layouts import LAYOUTS, PublishedLayout, Tensors
from ..nets.network import meta_network
from ..reading import brief
from ..stages import Stages
from .imported import remembered_sampling
from .latent import recorded_scale
from .layout_noise import NOISE, OWN, NoiseClues, diffusion_of, name_of, training_options

SD_SCALE = 0.18215  # of Stable Diffusion's latents, on which published networks of 4 channels are trained
SD_FACTOR = 8  # by which it reduces the sides of images
ARGUMENTS = "arguments"  # of the run, in exports
METADATA = "_metadata"  # attribute of a state dict, where torch keeps versions
SCALE, SHIFT = "scale_factor", "shift_factor"  # among them: of latents
INPUT, SHAPE = "input_shape", "data_shape"  # and of the network's inputs and the images
_OPTIONS = (
    "head_channels",
    "encoder_depth",
    "classes",
    "drop_sigma",
)  # of users and exports, not of a foreign config.json
_TOLD = ("head_channels", "encoder_depth", "classes")  # among them: of the network


@dataclass(frozen=True, kw_only=True)
class Found:
    """A published network as plain values.

    Attributes:
        layout: of its tensors.
        model: {published name: weight}; None if there are only averages.
        ema: averages by the same names; None if there are none.
        told: settings beside the tensors.
        codec: folder of an autoencoder beside them; None: there is none.
        clues: what tells on which noise it was trained.
        remembered: what an export says of its run (see `_arguments`); {}: it is a file of other code.
    """

    layout: type[PublishedLayout]
    model: Tensors | None
    ema: Tensors | None
    told: dict[str, Any]
    codec: Path | None = None
    clues: NoiseClues = field(default_factory=NoiseClues)
    remembered: dict[str, Any] = field(default_factory=dict)


def find_layout(path: Path) -> Found | None:
    """Return what a file or a folder of diffusers holds; None if no family's layout fits.

    Raises:
        UserError: if it is damaged.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.exists() or kind_of(path) != "torch":
        return None
    content = read_torch(path)
    parts = {name: content.get(name) for name in ("model", "ema")} if isinstance(content, dict) else {}
    model, ema = (_tensors(parts.get(name)) for name in ("model", "ema"))
    if model is None and ema is None:
        model = _tensors(content)
    layout = _recognised(model or ema or {})
    if layout is None:
        return None
    remembered = _remembered(content)
    clues = NoiseClues(file=path.name, training=training_options(content.get("args")), remembered=remembered.get(NOISE))
    return Found(layout=layout, model=model, ema=ema, told={}, remembered=remembered, clues=clues)


def _remembered(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an export says of its run, beside parts or in the metadata of a state dict; {} of other files."""
    modules = getattr(content, METADATA, None)
    root = modules.get("") if isinstance(modules, Mapping) else None
    holder = root if isinstance(root, Mapping) and ARGUMENTS in root else content
    return plain(holder.get(ARGUMENTS))


def _recognised(tensors: Mapping[str, Tensor]) -> type[PublishedLayout] | None:
    """Return the layout whose marks are among the names of tensors."""
    return next((LAYOUTS[name] for name in LAYOUTS if LAYOUTS[name].marks <= tensors.keys()), None)


def _tensors(value: Any) -> Tensors | None:
    """Return a mapping of names to whole tensors; None for any other value."""
    if not isinstance(value, dict) or not value:
        return None
    whole = all(
        isinstance(k, str) and isinstance(v, Tensor) and v.layout == torch.strided and not v.is_meta
        for k, v in value.items()
    )
    return {name: tensor.detach() for name, tensor in value.items()} if whole else None


def _of_folder(folder: Path) -> Found | None:
    index = read_index(folder)
    named = (folder, folder / "transformer") if index is None else (index.network.folder,)
    inner = next((f for f in named if (f / "config.json").is_file()), None)
    told = read_json(inner / "config.json") if inner is not None else None
    if inner is None or not isinstance(told, dict):
        return None
    layout = next((LAYOUTS[name] for name in LAYOUTS if LAYOUTS[name].reads(told)), None)
    if layout is None:
        _refuse_other(inner / "config.json", told)
        return None
    scheduler, codec = beside_transformer(folder, inner, index)
    tensors = _tensors(read_weights(inner))
    if tensors is None:
        raise UserError(f"{inner}: its weights are no state dict of whole tensors; save the model again")
    return Found(
        layout=layout,
        model=tensors,
        ema=None,
        told={name: value for name, value in told.items() if name not in _OPTIONS},
        codec=codec and codec.resolve(),
        clues=NoiseClues(file=folder.name, schedule=scheduler),
    )


def _refuse_other(file: Path, told: Mapping[str, Any]) -> None:
    """Refuse a transformer of diffusers of another kind, by its name."""
    kind = told.get("_class_name")
    if not isinstance(kind, str) or "Transformer" not in kind:
        return
    norm = f" with norm_type={brief(told.get('norm_type'))}" if kind == "Transformer2DModel" else ""
    known = ", ".join(LAYOUTS[name].class_name for name in LAYOUTS if LAYOUTS[name].class_name)
    raise UserError(
        f"{file}: _class_name={brief(kind)}{norm}: of transformers only {known}, or Transformer2DModel with "
        "norm_type='ada_norm_zero', is imported"
    )


def network_of(found: Found, asked: Mapping[str, Any]) -> NetworkConfig:
    """Return the configuration of a published network.

    Args:
        found: the network.
        asked: settings that the user gives: head_channels, encoder_depth, classes, drop_sigma; None: not given.

    Raises:
        UserError: if tensors are missing or have impossible shapes.
    """
    tensors = found.model if found.model is not None else found.ema
    assert tensors is not None
    own = {name: found.remembered[name] for name in _TOLD if name in found.remembered}
    for name, value in own.items():
        valid = type(value) is int and 0 < value < 10**6
        require(valid, f"{ARGUMENTS}: {name}={brief(value)} must be a positive whole number")
    told = {**found.told, **own, **{name: value for name, value in asked.items() if value is not None}}
    settings = found.layout.settings(tensors, told)
    eps, side = (f"config.json: {name}={brief(told.get(name))}" for name in ("norm_eps", "sample_size"))
    sources = {"network.norm_eps": eps, "network.size": side, "network": "the shapes of its tensors"}
    with file_terms(sources):
        network = NetworkConfig.of(found.layout.family, **settings)
    learnt = _as_in_file(found, network, tensors).get("learned_sigma")
    require(
        bool(learnt) or not asked.get("drop_sigma"),
        "drop_sigma: has no effect: the network has no outputs for a learnt variance; leave it out",
    )
    require(
        told.get("classes", network.num_classes) == network.num_classes,
        f"{ARGUMENTS}: classes={told.get('classes')}, but the class table is of {network.num_classes}",
    )
    return network


def states_of(found: Found, network: NetworkConfig) -> list[Tensors]:
    """Return our state dicts of the model and of its averages, as far as there are, float32.

    Raises:
        UserError: if names or shapes are not those of the network.
    """
    states = []
    for part in (found.model, found.ema):
        if part is None:
            continue
        whole = dataclasses.replace(network, **_as_in_file(found, network, part))
        require_tensors(part, found.layout.theirs(meta_network(whole).state_dict(), whole), whole)
        state = found.layout.ours({name: weight(name, value) for name, value in part.items()}, network)
        states.append({name: value.contiguous() for name, value in state.items()})
    return states


def _as_in_file(found: Found, network: NetworkConfig, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the settings that a file has although the user drops them."""
    own = {name: getattr(network, name, None) for name in ("encoder_depth", "head_channels")}
    own["classes"] = network.num_classes
    full = found.layout.settings(tensors, {**found.told, **own})
    return {name: value for name, value in full.items() if name == "learned_sigma"}


def config_of(found: Found, network: NetworkConfig, base: RunConfig | None, noise: str | None = None) -> RunConfig:
    """Return the configuration of a run with a published network, without its name.

    Args:
        found: the network.
        network: its configuration.
        base: gives training and sampling; None: the defaults.
        noise: that the user names, see `diffusion_of`.

    Raises:
        UserError: if base is for another network, or the noise is not one that is imported.
    """
    diffusion = diffusion_of(found.layout, found.clues, noise)
    if base is not None and base.network.family != network.family:
        raise UserError(
            f"holds a network of family {network.family!r}, but the preset {base.name!r} is for family "
            f"{base.network.family!r}; name another preset"
        )
    factor, inputs = _checked_factor(found, network), _input_shape(found, network)
    images = (3, factor * inputs[1], factor * inputs[2])
    codec, latents = CodecConfig(), SCALE in found.remembered if found.remembered else network.channels == 4
    if found.codec is not None or latents:
        scale, shift = _scale_and_shift(found)
        codec = CodecConfig(scale=scale, shift=shift, shape=inputs)
        if found.codec is not None:
            codec = dataclasses.replace(codec, source=str(found.codec.parent), subfolder=found.codec.name)
    data = DataConfig(source="", shape=_shape(found, SHAPE, images if codec.used else inputs))
    require(
        codec.used or data.shape[0] == network.channels,
        f"{ARGUMENTS}: {SHAPE}={list(data.shape)}, but the network has {network.channels} channels",
    )
    start = override(base or override(RunConfig(), {"sampling.calls": 20}), {"diffusion": diffusion})
    training = dataclasses.replace(
        start.training, shares="uniform", weights="prior", soft_intervals=0.0, augment=0.0, ema_rampup=0.0, branch_at=0
    )
    network = dataclasses.replace(network, dropout=start.network.dropout if base else 0.0)
    return dataclasses.replace(
        start,
        network=network,
        stages=Stages(),
        codec=codec,
        data=data,
        training=training,
        sampling=remembered_sampling(found.remembered, start.sampling),
    )


def archived_codec(found: Found) -> Tensors | None:
    """Return the weights of an autoencoder that only an archive of torch holds, which no run reads; None: nothing to do.

    Raises:
        UserError: if they are damaged.
    """
    folder = found.codec
    if folder is None or (folder / WEIGHTS).is_file() or not (folder / OLD_WEIGHTS).is_file():
        return None
    return {name: value.contiguous() for name, value in read_weights(folder).items()}


def write_codec(found: Found, weights: Tensors, folder: Path) -> None:
    """Write such an autoencoder to a new folder, as safetensors."""
    assert found.codec is not None
    folder.mkdir()
    write_atomic(folder / CONFIG, (found.codec / CONFIG).read_bytes())
    write_atomic(folder / WEIGHTS, save(weights, {"format": "pt"}))


def _scale_and_shift(found: Found) -> tuple[float, float]:
    """Return those of the latents: an exported run's, those of the autoencoder's config.json, or Stable Diffusion's."""
    told: Mapping[str, Any] = found.remembered
    names, file = (SCALE, SHIFT), ARGUMENTS
    if found.codec is not None:
        told, names, file = (
            read_mapping(found.codec / CONFIG),
            ("scaling_factor", "shift_factor"),
            "vae/config.json",
        )
    scale, shift = (told.get(name) for name in names)
    scale, shift = SD_SCALE if scale is None else scale, 0.0 if shift is None else shift
    valid = type(scale) in (int, float) and 0 < scale < math.inf
    require(valid, f"{file}: {names[0]}={brief(scale)} must be a positive number")
    valid = type(shift) in (int, float) and math.isfinite(shift)
    require(valid, f"{file}: {names[1]}={brief(shift)} must be a finite number")
    return float(scale), float(shift)


def _checked_factor(found: Found, network: NetworkConfig) -> int:
    """Return by what sides of images are divided: told by an autoencoder beside the network, whose latents it must fit."""
    told = {} if found.codec is None else read_mapping(found.codec / CONFIG)
    channels, levels = told.get("latent_channels", network.channels), told.get("block_out_channels")
    require(
        channels == network.channels,
        f"vae/config.json: latent_channels={brief(channels)}, but the network has {network.channels} channels",
    )
    valid = levels is None or (isinstance(levels, list) and 0 < len(levels) < 10)
    require(valid, f"vae/config.json: block_out_channels={brief(levels)} must be a list of widths")
    return SD_FACTOR if levels is None else int(2 ** (len(levels) - 1))


def _shape(found: Found, name: str, usual: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return the shape of images or inputs: an exported run's, or the usual one of such a network."""
    said = found.remembered.get(name, list(usual))
    valid = isinstance(said, list) and len(said) == 3 and all(type(n) is int and 0 < n < 10**6 for n in said)
    require(valid, f"{ARGUMENTS}: {name}={brief(said)} must be [channels, height, width]")
    channels, height, width = said
    return channels, height, width


def _input_shape(found: Found, network: NetworkConfig) -> tuple[int, int, int]:
    """Return the shape of the network's inputs: an exported run's, which may be padded to patches, or the network's size."""
    height, width = network.size  # type: ignore[attr-defined]
    shape = _shape(found, INPUT, (network.channels, height, width))
    require(
        shape[0] == network.channels and _grid(network, shape[1:]) == network.grid,  # type: ignore[attr-defined]
        f"{ARGUMENTS}: {INPUT}={list(shape)}, but the network is for {[network.channels, height, width]}",
    )
    return shape


def _grid(network: NetworkConfig, size: Sequence[int]) -> tuple[int, int]:
    """Return the rows and columns of patches in an input of a size."""
    found: tuple[int, int] = dataclasses.replace(network, size=tuple(size)).grid  # type: ignore[call-arg, attr-defined]
    return found


def export_layout(config: RunConfig, file: Path, *, model: Tensors, ema: Tensors) -> bytes | None:
    """Return a run's weights as the content of a file in the layout of its family; None if no layout is written.

    Args:
        config: of the run.
        file: where it will be written; its suffix is checked.
        model, ema: our state dicts.

    Raises:
        UserError: if the layout has no place for the network, or its code reads another noise.
    """
    family = config.network.family
    layout = next((LAYOUTS[n] for n in LAYOUTS if LAYOUTS[n].family == family and LAYOUTS[n].suffix), None)
    if layout is None:
        return None
    require(
        file.suffix == layout.suffix,
        f"--out {file}: family {family!r} is written as {layout.suffix}; give that suffix",
    )
    size, known = config.input_shape[1:], config.network.size  # type: ignore[attr-defined]
    require(
        _grid(config.network, size) == _grid(config.network, known),
        f"network.size={list(known)}: the inputs of this run are {list(size)}, for which positions are "
        f"interpolated; {layout.code} knows positions of one size only, so that this run cannot be exported",
    )
    noise, arguments = name_of(config.diffusion, layout), _arguments(config)
    if noise != OWN:
        arguments[NOISE] = noise
    average = OrderedDict(layout.theirs(ema, config.network))
    if layout.averaged:  # a state dict alone, which the published code loads strictly
        setattr(average, METADATA, OrderedDict({"": {"version": 1, ARGUMENTS: arguments}}))
        return torch_bytes(average)
    return torch_bytes({"model": layout.theirs(model, config.network), "ema": dict(average), ARGUMENTS: arguments})


def _arguments(config: RunConfig) -> dict[str, Any]:
    """Return what shapes do not show of a run: heads, depth and classes of its network, its latents, its sampler."""
    network, codec = config.network, config.codec
    told = {"head_channels": network.head_channels, "encoder_depth": network.encoder_depth}  # type: ignore[attr-defined]
    if network.num_classes:
        told["classes"] = network.num_classes
    latents = {SCALE: recorded_scale(codec), SHIFT: codec.shift} if codec.used else {}
    return {
        **told,
        **latents,
        INPUT: list(config.input_shape),
        SHAPE: list(config.data.shape),
        SAMPLING: to_dict(config.sampling),
    }
