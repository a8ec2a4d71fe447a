"""Import of published checkpoints as runs."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import torch

from ..config import CodecConfig, DiffusionConfig, NetworkConfig, RunConfig
from ..config.paper_presets import PAPER_PRESETS
from ..config.serialization import from_dict
from ..errors import UserError
from ..files import disk_errors, write_json
from ..interop.autoencoder import vq_model
from ..interop.layouts import Published, Tensors, read_published
from ..interop.shapes import network_of, our_state, resolution_of
from ..schedules.discrete import Discrete, UniformSteps
from ..stage_finding import StageResult
from ..stages import Stages
from ..training.run import Run
from .exchange import EDGES, HEADS, betas_of, layout_of
from .import_unet2d import import_unet2d
from .imported import continued_training, data_without_source, save_first_checkpoint


def import_published(
    file: Path | str,
    out: Path | str,
    *,
    base: RunConfig | None = None,
    size: tuple[int, int] | None = None,
    result: StageResult | None = None,
    head_channels: int | None = None,
    replace: bool = False,
) -> Run:
    """Create a run from a published checkpoint: score_sde's .pth, EDM's .pkl, latent diffusion's .ckpt, or an export.

    Of a folder that diffusers wrote, the UNet2DModel becomes a run with one stage, see `import_unet2d`.

    No code in the file is executed. The network is derived from tensor names and shapes. The run has one checkpoint, at
    step 0, and no data; resume it with some.

    Args:
        file: the checkpoint, or the folder of a pipeline of diffusers.
        out: the run's new folder.
        base: gives training, sampling and, if their number fits, the stages; default: the paper's preset of the same
            family and number of stages.
        size: (height, width) of the network's input; default: that of base (EDM's files contain it).
        result: gives the stages, with the edges that the network was trained on.
        head_channels: channels per attention head of an LDM U-Net; default: the value in an exported run, else 32.
        replace: move an existing run aside.

    Returns:
        The run.

    Raises:
        UserError: in one line: the file is damaged, hostile or does not fit, or its stages are unknown.
    """
    if Path(file).is_dir():
        for name, given in (("head_channels", head_channels), ("stages", result)):
            if given is not None:
                raise UserError(f"{file}: {name} do not go with a folder of diffusers, which holds all; leave them out")
        return import_unet2d(file, out, base=base, size=size, replace=replace)
    file, published = Path(file), read_published(Path(file))
    weights = published.model or published.ema
    assert weights is not None
    try:
        heads = _heads(published, head_channels)
        network = network_of(published.family, weights, norm_groups=published.norm_groups, head_channels=heads)
        base = base or _paper_preset(network)
        size = _size(published, weights, size, base)
        tensors = [our_state(part, network, size) for part in (published.model, published.ema) if part is not None]
        config = _config(published, network, base, size, result)
        codec, folder = _first_stage(file, published), Path(out) / "codec"
        config = dataclasses.replace(_on_latents(config, base, published, codec, folder), name=Path(out).name)
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


def _heads(published: Published, given: int | None) -> int:
    """Return the channels of an attention head: the given value, the file's value, or latent diffusion's usual 32."""
    if given is not None and published.family != "ldm":
        raise UserError(f"head_channels={given}: a network of family {published.family!r} has one head; leave it out")
    return int(_number(published, HEADS, 32)) if given is None else given


def _number(published: Published, name: str, default: float) -> float:
    """Return a number from the arguments of a file."""
    said = published.arguments.get(name, default)
    if not isinstance(said, int | float):
        raise UserError(f"{name}={said!r} must be a number")
    return said


def _paper_preset(network: NetworkConfig) -> RunConfig:
    """Return the first paper preset of a network's family and number of stages, else the first of its family."""
    known = [config for config in (make() for make in PAPER_PRESETS.values()) if layout_of(config) == network.family]
    alike = [config for config in known if len(config.stages) == len(network.decoder_widths)]
    return (alike or known)[0]


def _size(published: Published, weights: Tensors, size: tuple[int, int] | None, base: RunConfig) -> tuple[int, int]:
    if size is not None and min(size) < 1:
        raise UserError(f"size={size} must be positive")
    if published.family != "ddpmpp":
        _, height, width = base.input_shape
        return size or (height, width)
    resolution = resolution_of(weights)
    if size not in (None, (resolution, resolution)):
        raise UserError(f"size={size}: the tensor names give {resolution} x {resolution}; leave the size out")
    return resolution, resolution


def _config(
    published: Published, network: NetworkConfig, base: RunConfig, size: tuple[int, int], result: StageResult | None
) -> RunConfig:
    """Return the configuration of the run, without its codec and name."""
    if layout_of(base) != network.family:
        raise UserError(
            f"holds a network of family {network.family!r} with its published preconditioning, but the preset "
            f"{base.name!r} is for family {base.network.family!r} with {base.diffusion.precondition!r}; name another preset"
        )
    dropout = base.network.dropout
    if network.family == "ddpmpp":
        dropout = _number(published, "dropout", dropout)
    diffusion = _diffusion(published, base.diffusion)
    return dataclasses.replace(
        base,
        data=data_without_source(base.data, (network.channels, *size)),
        network=dataclasses.replace(network, dropout=float(dropout)),
        diffusion=diffusion,
        stages=_stages(published, network, base, diffusion, result),
        training=continued_training(base.training, network),
    )


def _diffusion(published: Published, base: DiffusionConfig) -> DiffusionConfig:
    """Return the noise settings that a network was trained with, as far as its file contains them."""
    if published.family == "ddpmpp":
        return dataclasses.replace(base, sigma_data=float(_number(published, "sigma_data", 0.5)))
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


def _stages(
    published: Published,
    network: NetworkConfig,
    base: RunConfig,
    diffusion: DiffusionConfig,
    result: StageResult | None,
) -> Stages:
    """Return the stages that a network was trained on: the given ones, those of the file, or base's."""
    decoders, said = len(network.decoder_widths), published.arguments.get(EDGES)
    if result is not None:
        stages = result.stages()
    elif isinstance(said, list):
        stages = from_dict(Stages, {"interior": said, "origin": {"rule": "of the imported network"}}, "stages")
    elif decoders == 1:
        stages = Stages()
    else:
        stages = _moved(base.stages, base.diffusion, diffusion)
    if len(stages) != decoders:
        raise UserError(
            f"holds {decoders} decoders, but the stages are {len(stages)}; give the stages that the decoders were trained on "
            "(--stages stages.json, or a --preset of as many stages)"
        )
    return stages


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
        return vq_model(published.codec)
    except UserError as error:
        warnings.warn(f"{file}: the codec is left out: {error}", stacklevel=3)
        return None


def _on_latents(config: RunConfig, base: RunConfig, published: Published, codec: Any, folder: Path) -> RunConfig:
    """Return a configuration on the latents of an autoencoder: the file's own, or base's."""
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
        factor, colours = base.data.shape[1] // base.codec.shape[1], base.data.shape[0]
        own = base.codec if base.codec.shape[0] == channels else CodecConfig()
    latents = dataclasses.replace(
        own,
        scale=(own.scale or 1.0) if scale is None else scale.item(),
        shape=(channels, height, width),
        fingerprint="",
    )
    return dataclasses.replace(
        config, codec=latents, data=data_without_source(base.data, (colours, height * factor, width * factor))
    )
