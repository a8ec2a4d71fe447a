"""Export of runs to published layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from ..config import RunConfig
from ..errors import UserError
from ..files import write_atomic
from ..interop.layouts import DDPMPP, SUFFIXES, Published, Tensors, published_bytes
from ..interop.shapes import published_state
from ..nets.ddpmpp import DDPMppConfig
from ..nets.layouts import LAYOUTS
from ..nets.ldm import LDMConfig
from ..nets.unet import UNetConfig
from ..schedules.discrete import Discrete
from ..training.checkpoint import checkpoint_step, trained_config
from ..training.run import Run
from .exchange import EDGES, HEADS, betas_of, layout_of
from .exchange_layouts import export_layout

PARTS: tuple[Literal["model", "ema"], ...] = ("model", "ema")


def export_published(
    run: Run | Path | str, file: Path | str, *, checkpoint: str = "best", overwrite: bool = False
) -> Path:
    """Write a run's weights and their EMA in the published layout of its family.

    NCSN++ is written as score_sde's .pth, the LDM U-Net as latent diffusion's .ckpt, a one-stage transformer in the layout
    that its family brings along (`nets.layouts.LAYOUTS`). DDPM++ is written as .safetensors
    with EDM's names and arguments, because EDM's pickles would have to contain EDM's source code. The file also holds
    what shapes do not show (stage edges, channels of an attention head), so that `import_published` restores the same
    network.

    Args:
        run: a run, or its folder.
        file: the file to write.
        checkpoint: "best", "latest" or a step.
        overwrite: replace an existing file.

    Returns:
        The file.

    Raises:
        UserError: if the layout cannot represent the run's network or noise, or the file may not be written.
    """
    run, file = run if isinstance(run, Run) else Run.open(Path(run)), Path(file)
    folder = run.checkpoint(checkpoint)
    config = trained_config(folder)
    own = _in_own_layout(run, checkpoint, config, file)
    if own is not None:
        _require_room(file, overwrite=overwrite)
        write_atomic(file, own)
        return file
    if not layout_of(config):
        raise UserError(
            f"{run.path}: no published layout exists for family {config.network.family!r} with precondition "
            f"{config.diffusion.precondition!r}, schedule {config.diffusion.schedule.kind!r} and the run's other settings; it "
            "cannot be exported"
        )
    suffix = SUFFIXES[config.network.family]
    if file.suffix != suffix:
        raise UserError(f"--out {file}: family {config.network.family!r} is written as {suffix}; give that suffix")
    _require_room(file, overwrite=overwrite)
    _, height, width = config.input_shape
    model, ema = (_published_part(run, checkpoint, part, (height, width)) for part in PARTS)
    network = config.network
    assert isinstance(network, UNetConfig)  # those with a layout
    published = Published(
        family=network.family,  # type: ignore[arg-type]
        model=model,
        ema=ema,
        buffers=_buffers(config),
        arguments=_arguments(config, (height, width)),
        norm_groups=network.max_norm_groups,
        step=checkpoint_step(folder),
    )
    write_atomic(file, published_bytes(published))
    return file


def _require_room(file: Path, *, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise UserError(f"--out {file}: exists; choose another name or give --overwrite")


def _in_own_layout(run: Run, checkpoint: str, config: RunConfig, file: Path) -> bytes | None:
    """Return the content of a file in a layout that the run's family brings along; None if it brings none."""
    if not any(LAYOUTS[name].family == config.network.family for name in LAYOUTS):
        return None
    model, ema = (dict(run.denoiser(checkpoint, part).network.state_dict()) for part in PARTS)
    return export_layout(config, file, model=model, ema=ema)


def _published_part(run: Run, checkpoint: str, part: Literal["model", "ema"], size: tuple[int, int]) -> Tensors:
    network = run.denoiser(checkpoint, part).network
    return published_state(network.state_dict(), network.config, size)


def _buffers(config: RunConfig) -> Tensors:
    """Return the buffers that latent diffusion stores beside its networks."""
    schedule = config.diffusion.schedule
    if config.network.family != "ldm" or not isinstance(schedule, Discrete):
        return {}
    buffers = {"betas": betas_of(schedule).float()}
    if config.codec.used and config.codec.scale is not None:
        buffers["scale_factor"] = torch.tensor(config.codec.scale, dtype=torch.float64)
    return buffers


def _arguments(config: RunConfig, size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments that a file stores beside its tensors: stage edges, and the family's own arguments."""
    network, arguments = config.network, {EDGES: list(config.stages.interior)}
    if isinstance(network, LDMConfig):
        return {**arguments, HEADS: network.head_channels}
    if not isinstance(network, DDPMppConfig):
        return arguments
    return {
        **arguments,
        "img_resolution": size[0],
        "img_channels": network.channels,
        "label_dim": network.num_classes,
        "sigma_data": config.diffusion.sigma_data,
        "model_type": "SongUNet",
        **DDPMPP,
        "model_channels": network.encoder_width,
        "channel_mult": list(network.channel_mult),
        "num_blocks": network.blocks_per_level,
        "attn_resolutions": [size[0] // factor for factor in network.attention_factors],
        "augment_dim": network.augment_dim,
        "dropout": network.dropout,
    }
