"""Import of published checkpoints as runs."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..config import CodecConfig, DiffusionConfig, NetworkConfig, RunConfig
from ..config.paper_presets import PAPER_PRESETS
from ..config.serialization import from_dict
from ..errors import UserError, require
from ..files import disk_errors, write_json
from ..interop.autoencoder import downsampling, first_stage
from ..interop.file_terms import file_terms
from ..interop.layouts import read_published
from ..interop.parts import EDGES, HEADS, ORIGINAL, Published, Tensors
from ..interop.shapes import network_of, our_state, resolution_of
from ..nets.blocks import GROUPS
from ..nets.song import SongUNetConfig
from ..reading import brief
from ..schedules.discrete import Discrete, UniformSteps
from ..stage_finding import StageResult
from ..stages import Stages
from ..training.run import Run
from . import exchange_layouts as layouts
from .exchange import betas_of, layout_of, regrouped
from .exchange_layouts import Found, find_layout
from .import_options import heads_of, norm_groups_of, require_options_of, require_positive, require_unused
from .import_unet2d import import_unet2d
from .imported import continued_training, data_without_source, remembered_sampling, save_first_checkpoint

ASSUMED = "assumed"  # in the origin of stages that the file did not tell: the preset that they are of


def import_published(
    file: Path | str,
    out: Path | str,
    *,
    base: RunConfig | None = None,
    size: tuple[int, int] | None = None,
    result: StageResult | None = None,
    edges: Sequence[float] | None = None,
    head_channels: int | None = None,
    norm_groups: int | None = None,
    encoder_depth: int | None = None,
    classes: int | None = None,
    drop_sigma: bool = False,
    noise: str | None = None,
    sampler: str = "ddim",
    replace: bool = False,
) -> Run:
    """Create a run from a published checkpoint: score_sde's .pth, EDM's .pkl, latent diffusion's .ckpt, or an export.

    Files and folders in a layout of `nets.layouts.LAYOUTS`, such as published transformers, are read, too. Of another folder
    that diffusers wrote, the UNet2DModel becomes a run with one stage, see `import_unet2d`.

    No code in the file is executed. The network is derived from tensor names and shapes. The run has one checkpoint, at
    step 0, and no data; resume it with some. What the file does not tell and is not given is assumed, with a warning
    where a wrong value would change the images.

    Args:
        file: the checkpoint, or the folder of a pipeline of diffusers.
        out: the run's new folder.
        base: gives training and, if the file does not tell them, sampling and stages; default: the paper's preset of the
            same family and number of stages.
        size: (height, width) of the network's input; default: that of base (EDM's files contain it).
        result: gives the stages, with the edges that the network was trained on.
        edges: the same edges as numbers, in sigma, ascending.
        norm_groups: largest number of GroupNorm groups of an NCSN++ or DDPM++; default: that of the file, else 32 for
            score_sde's own code and 16 for the multi-stage code.
        head_channels: channels per attention head of an LDM U-Net or a transformer; default: the value in an exported
            run, else 32; of a transformer those of the published network of its width.
        encoder_depth: blocks of a transformer that become the encoder which all stages can share; default: half.
        classes: classes of a transformer whose class table does not tell.
        drop_sigma: leave out a transformer's outputs for a learnt variance.
        noise: on which a transformer's weights were trained, where the file does not tell: "ddpm" (default) or "sit".
        sampler: of the run of a UNet2DModel: "ddim", or "own" for that of its pipeline, such as DDPM's in 1000 calls.
        replace: move an existing run aside.

    Returns:
        The run.

    Raises:
        UserError: in one line: the file is damaged, hostile or does not fit, or its stages are unknown.
    """
    file = Path(file)
    if Run(file).checkpoints.is_dir():
        raise UserError(f"{file}: is a run already; use it as it is, or start from it: msdiff train --init-from {file}")
    numbers = {"head_channels": head_channels, "norm_groups": norm_groups}
    own: dict[str, Any] = {"encoder_depth": encoder_depth, "classes": classes}
    try:
        require_positive(size, {**numbers, **own})
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    own |= {"drop_sigma": drop_sigma or None, "noise": noise}
    require(sampler in ("ddim", "own"), f"sampler={sampler!r} is unknown; choose ddim or own")
    unused = {"sampler": None if sampler == "ddim" else sampler}
    given = {**numbers, "stages": result, "edges": None if edges is None else list(edges)}
    found = find_layout(file)
    if found is not None:
        require_unused(unused, "a transformer")
        require_options_of(found.layout, {**given, **own, "size": size})
        return _import_layout(file, Path(out), found, base, {**own, "head_channels": head_channels}, replace=replace)
    require_unused(own, "what is not a transformer")
    if file.is_dir():
        require_unused(given, "a folder of diffusers, which tells all")
        return import_unet2d(file, out, base=base, size=size, own_sampler=sampler == "own", replace=replace)
    require_unused(unused, "what is no folder of diffusers")
    published = read_published(file)
    weights = published.model or published.ema
    assert weights is not None
    try:
        heads, groups = heads_of(published, head_channels), norm_groups_of(published, norm_groups)
        with file_terms(_sources(published, heads, groups, given=head_channels is not None)):
            network = network_of(published.family, weights, norm_groups=groups, head_channels=heads)
        chosen, base = base is not None, base or _paper_preset(network)
        size = _size(published, weights, size, base)
        tensors = [our_state(part, network, size) for part in (published.model, published.ema) if part is not None]
        with file_terms({"network": f"size={size}"}):
            network.require_size(*size)
        stages = _stages(published, network, base, _given_stages(result, edges))
        config = _config(published, network, base, size, stages)
        codec, folder = _first_stage(file, published), Path(out) / "codec"
        latents = base.codec if chosen and not published.codec else CodecConfig()
        config = dataclasses.replace(_on_latents(config, base, latents, published, codec, folder), name=Path(out).name)
        _warn_of_assumptions(file, published, config, groups if norm_groups is None else None)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if published.ema is None:
        warnings.warn(f"{file}: holds no EMA weights; the EMA starts from the model's weights", stacklevel=2)

    def fill(run: Run) -> None:
        if codec is not None:
            with disk_errors(folder):
                codec.save_pretrained(run.path / folder.name)
        write_json(run.imported_file, {"file": file.name})
        save_first_checkpoint(run, config, model=tensors[0], ema=tensors[-1])

    return Run.create(Path(out), config, replace=replace, fill=fill)


def _import_layout(
    file: Path, out: Path, found: Found, base: RunConfig | None, asked: dict[str, Any], *, replace: bool
) -> Run:
    """Create a run from a network in a family's own layout."""
    try:
        network = layouts.network_of(found, asked)
        states = layouts.states_of(found, network)
        config = layouts.config_of(found, network, base, asked["noise"])
        config, codec = dataclasses.replace(config, name=out.name), out / "codec"
        archived = layouts.archived_codec(found)
        if archived is not None:
            own = dataclasses.replace(config.codec, source=str(codec.resolve()), subfolder="")
            config = dataclasses.replace(config, codec=own)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None

    def fill(run: Run) -> None:
        if archived is not None:
            with disk_errors(codec):
                layouts.write_codec(found, archived, run.path / codec.name)
        write_json(run.imported_file, {"file": file.name})
        save_first_checkpoint(run, config, model=states[0], ema=states[-1])

    return Run.create(out, config, replace=replace, fill=fill)


def _sources(published: Published, heads: int, groups: int, *, given: bool) -> dict[str, str]:
    """Return what settings of the network come from, for messages; `given`: whether the user gave the heads."""
    if given:
        told = f"head_channels={heads}"
    elif HEADS in published.arguments:
        told = f"{HEADS}={heads}"
    else:
        told = f"head_channels={heads} (assumed)"
    return {
        "network.head_channels": told,
        "network.norm_groups": f"norm_groups={groups}",
        "network": f"the shapes of its tensors, with norm_groups={groups}",
    }


def _number(published: Published, name: str, default: float) -> float:
    """Return a number from the arguments of a file."""
    said = published.arguments.get(name, default)
    if not isinstance(said, int | float):
        raise UserError(f"{name}={brief(said)} must be a number")
    return said


def _paper_preset(network: NetworkConfig) -> RunConfig:
    """Return the first paper preset of a network's family and number of stages, else the first of its family."""
    known = [config for config in (make() for make in PAPER_PRESETS.values()) if layout_of(config) == network.family]
    alike = [config for config in known if len(config.stages) == len(network.decoder_widths)]
    return (alike or known)[0]


def _size(published: Published, weights: Tensors, size: tuple[int, int] | None, base: RunConfig) -> tuple[int, int]:
    if published.family != "ddpmpp":
        _, height, width = base.input_shape
        return size or (height, width)
    resolution = resolution_of(weights)
    if size not in (None, (resolution, resolution)):
        raise UserError(f"size={size}: the tensor names give {resolution} x {resolution}; leave the size out")
    return resolution, resolution


def _require_base(network: NetworkConfig, base: RunConfig) -> None:
    if layout_of(base) != network.family:
        raise UserError(
            f"holds a network of family {network.family!r} with its published preconditioning, but the preset "
            f"{base.name!r} is for family {base.network.family!r} with {base.diffusion.precondition!r}; name another preset"
        )


def _config(
    published: Published, network: NetworkConfig, base: RunConfig, size: tuple[int, int], stages: Stages
) -> RunConfig:
    """Return the configuration of the run, without its codec and name."""
    dropout = base.network.dropout
    if network.family == "ddpmpp":
        dropout = _number(published, "dropout", dropout)
    with file_terms({"network.dropout": f"dropout={dropout}"}):
        network = dataclasses.replace(network, dropout=float(dropout))
    return dataclasses.replace(
        base,
        data=data_without_source(base.data, (network.channels, *size)),
        network=network,
        diffusion=_diffusion(published, base.diffusion),
        stages=stages,
        training=continued_training(base.training, network),
        sampling=remembered_sampling(published.arguments, base.sampling),
    )


def _diffusion(published: Published, base: DiffusionConfig) -> DiffusionConfig:
    """Return the noise settings that a network was trained with, as far as its file contains them."""
    if published.family == "ddpmpp":
        sigma_data = _number(published, "sigma_data", 0.5)
        with file_terms({"diffusion.sigma_data": f"sigma_data={sigma_data}"}):
            return dataclasses.replace(base, sigma_data=float(sigma_data))
    betas = published.buffers.get("betas")
    if betas is None or published.family != "ldm":
        return base
    assert isinstance(base.schedule, Discrete)
    if betas.ndim != 1 or len(betas) < 2:
        raise UserError(f"betas has shape {list(betas.shape)}; a schedule has a number for every step")
    start, end = (float(f"{betas[i].item():.6g}") for i in (0, -1))
    known = [
        Discrete(beta_start=start, beta_end=end, steps=len(betas), spacing=spacing)
        for spacing in ("sqrt", "linear")
        if 0 < start <= end < 1
    ]
    for schedule in (base.schedule, *known):
        own = betas_of(schedule)
        if own.shape == betas.shape and torch.allclose(own, betas.double(), rtol=1e-4):
            return dataclasses.replace(base, schedule=schedule, prior=UniformSteps(schedule=schedule))
    raise UserError(
        "betas are linear neither in themselves nor in their square root; no other schedule can be imported"
    )


def _given_stages(result: StageResult | None, edges: Sequence[float] | None) -> Stages | None:
    """Return the stages that the caller gives, if any."""
    if result is not None and edges is not None:
        raise UserError(f"edges={list(edges)}: --stages gives them, too; give one of them")
    if edges is not None:
        return Stages(tuple(edges), {"rule": "given at import"})
    return None if result is None else result.stages()


def _stages(published: Published, network: NetworkConfig, base: RunConfig, given: Stages | None) -> Stages:
    """Return the stages that a network was trained on: the given ones, those of the file, or base's."""
    _require_base(network, base)
    decoders, said = len(network.decoder_widths), published.arguments.get(EDGES)
    if given is not None:
        stages = given
    elif said is not None:
        with file_terms({"stages.interior": f"{EDGES}={brief(said)}", "stages": f"{EDGES}={brief(said)}"}):
            stages = from_dict(Stages, {"interior": said, "origin": {"rule": "of the imported network"}}, "stages")
    elif decoders == 1:
        stages = Stages()
    else:
        stages = _moved(base.stages, base.diffusion, _diffusion(published, base.diffusion))
        stages = Stages(stages.interior, {**stages.origin, ASSUMED: base.name})
    if len(stages) != decoders:
        raise UserError(
            f"holds {decoders} decoders, but the stages are {len(stages)}; give the stages that the decoders were trained on "
            "(--edges in sigma, --stages stages.json, or a --preset of as many stages)"
        )
    return stages


def _warn_of_assumptions(file: Path, published: Published, config: RunConfig, groups: int | None) -> None:
    """Warn of what was assumed and changes the images if it is wrong.

    Args:
        file: the checkpoint.
        published: its content.
        config: of the run.
        groups: the number of GroupNorm groups, None if the caller gave it.
    """
    assumed = config.stages.origin.get(ASSUMED)
    if assumed:
        edges = " ".join(f"{edge:g}" for edge in config.stages.interior)
        warnings.warn(
            f"{file}: does not tell at which noise its {len(config.stages)} decoders change; the edges of preset {assumed} are "
            f"assumed (sigma = {edges}). If it was trained with others, import it again with --edges",
            stacklevel=3,
        )
    network = config.network
    if groups is not None and not published.norm_groups_known and isinstance(network, SongUNetConfig):
        other = ORIGINAL if groups == GROUPS else GROUPS
        if differing := regrouped(network, other):
            warnings.warn(
                f"{file}: does not tell the groups of its GroupNorms; up to {groups} are assumed, as in the published "
                f"configuration ({differing} of its layers would have others with {other}). If it was trained with others, "
                "import it again with --norm-groups",
                stacklevel=3,
            )


def _moved(stages: Stages, before: DiffusionConfig, after: DiffusionConfig) -> Stages:
    """Return stages cut at the same steps of another discrete schedule; the same stages if the schedule is the same."""
    if after.schedule == before.schedule:
        return stages
    steps = [before.schedule.edge_time(edge) for edge in stages.interior]
    return Stages(tuple(after.schedule.edge_sigma(step) for step in steps), stages.origin)


def _first_stage(file: Path, published: Published) -> Any:
    """Return the autoencoder of a latent diffusion file; None if it has none that can be used."""
    strangers = [name for name in published.buffers if "." in name]  # buffers of a schedule have names without dots
    if strangers:
        warnings.warn(f"{file}: {len(strangers)} tensors of other networks are left out ({strangers[0]})", stacklevel=3)
    if not published.codec:
        return None
    try:
        scale = published.buffers.get("scale_factor")
        return first_stage(published.codec, scale.item() if scale is not None and scale.numel() == 1 else 1.0)
    except UserError as error:
        warnings.warn(f"{file}: the codec is left out: {error}", stacklevel=3)
        return None


def _on_latents(
    config: RunConfig, base: RunConfig, own: CodecConfig, published: Published, codec: Any, folder: Path
) -> RunConfig:
    """Return a configuration on the latents of an autoencoder.

    Args:
        config: as yet on pixels.
        base: of the preset.
        own: the codec to name if the file has none.
        published: the file.
        codec: the file's first stage as a model of diffusers, None if there is none.
        folder: where it will be written.
    """
    if codec is None and not base.codec.used:
        return config
    channels, height, width = config.data.shape
    scale = published.buffers.get("scale_factor")
    if scale is not None and scale.numel() != 1:
        raise UserError(f"scale_factor has shape {list(scale.shape)}, not one number")
    if codec is not None:
        factor, colours = 2 ** (len(codec.config.block_out_channels) - 1), codec.config.in_channels
        own = CodecConfig(source=str(folder.resolve()))
    else:
        # an autoencoder is no matter of channels: unless the preset was named, the user has to name one
        factor, colours = downsampling(published.codec) or base.data.shape[1] // base.codec.shape[1], base.data.shape[0]
        own = own if own.used and own.shape[0] == channels else CodecConfig()
    said = (own.factor or 1.0) if scale is None else scale.item()
    with file_terms({"codec.scale": f"scale_factor={said}"}):
        latents = dataclasses.replace(own, scale=said, shape=(channels, height, width), fingerprint="")
    return dataclasses.replace(
        config, codec=latents, data=data_without_source(base.data, (colours, height * factor, width * factor))
    )
