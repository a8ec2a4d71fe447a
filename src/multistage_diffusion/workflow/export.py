"""Export of runs to published layouts."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ..config import RunConfig
from ..config.serialization import to_dict
from ..errors import UserError
from ..files import write_atomic
from ..interop.edm import DDPMPP, STAGE_INTERVAL
from ..interop.layouts import SUFFIXES, published_bytes
from ..interop.parts import EDGES, HEADS, ORIGINAL, SAMPLING, Published, Tensors
from ..interop.shapes import published_state
from ..nets.blocks import GROUPS
from ..nets.ddpmpp import DDPMppConfig
from ..nets.layouts import LAYOUTS
from ..nets.ldm import LDMConfig
from ..nets.song import SongUNetConfig
from ..nets.unet import UNetConfig
from ..schedules.discrete import Discrete
from ..training.checkpoint import checkpoint_step
from ..training.run import Run
from .exchange import betas_of, exported_config, layout_of, regrouped
from .exchange_layouts import export_layout

PARTS: tuple[Literal["model", "ema"], ...] = ("model", "ema")


def export_published(
    run: Run | Path | str, file: Path | str, *, checkpoint: str = "best", overwrite: bool = False
) -> Path:
    """Write a run's weights and their EMA in the published layout of its family.

    NCSN++ is written as score_sde's .pth, the LDM U-Net as latent diffusion's .ckpt, a one-stage transformer in the layout
    that its family brings along (`nets.layouts.LAYOUTS`). DDPM++ is written as .safetensors
    with EDM's names and arguments, because EDM's pickles would have to contain EDM's source code. The file also holds
    what shapes do not show (stage edges, channels of an attention head, scale of latents, the run's sampler), so that
    `import_published` restores the same run. A warning says where the original code would compute something else with the file.

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
    config = exported_config(run, checkpoint)
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
    for difference in differences(config):
        warnings.warn(f"{file}: {difference}", stacklevel=2)
    published = Published(
        family=network.family,  # type: ignore[arg-type]
        model=model,
        ema=ema,
        buffers=_buffers(config),
        arguments=_arguments(config, (height, width)),
        settings=_settings(config),
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


def differences(config: RunConfig) -> list[str]:
    """Return one line for each way in which the original code would compute something else with a run's weights."""
    network, (_, height, width) = config.network, config.input_shape
    stages, found = len(config.stages), []
    if isinstance(network, SongUNetConfig) and not (network.family == "ncsnpp" and stages > 1):  # there it is a setting
        theirs = ORIGINAL if stages == 1 else GROUPS
        if regrouped(network, theirs):
            found.append(
                f"network.norm_groups={network.norm_groups}, but the original code's GroupNorms have up to {theirs} groups: it "
                f"would compute something else with these weights; train with network.norm_groups={theirs} for exports"
            )
    if height % network.multiple or width % network.multiple:
        found.append(
            f"inputs of {height} x {width} are padded to multiples of {network.multiple} here; the original code does not pad "
            "and cannot use them"
        )
    if config.codec.shift:
        found.append(
            f"codec.shift={config.codec.shift:g}: the original code has no shift of latents, and decodes other images; add the "
            "shift to the latents that it decodes"
        )
    if isinstance(network, LDMConfig) and network.attention_factors:
        attends = tuple(network.decoder_attends(k) for k in range(stages))
        theirs_attend = tuple(k == 0 for k in range(stages))
        if attends != theirs_attend:
            found.append(
                f"network.decoder_attention={list(attends)}, but the original code builds {list(theirs_attend)}; it cannot load "
                "these weights"
            )
    return found


def original_settings(config: RunConfig) -> dict[str, Any]:
    """Return what the original code must be told to compute the same with an exported file, as it does not read it there.

    Keys are those of its configuration: ml_collections for score_sde, YAML for latent diffusion. The arguments of EDM's
    classes are in the file.
    """
    network, stages, schedule = config.network, config.stages, config.diffusion.schedule
    if isinstance(network, LDMConfig) and isinstance(schedule, Discrete):
        cuts = [int(schedule.edge_time(edge)) for edge in stages.interior]
        found = {
            "beta_schedule": "linear" if schedule.spacing == "sqrt" else "sqrt_linear",
            "linear_start": schedule.beta_start,
            "linear_end": schedule.beta_end,
            "timesteps": schedule.steps,
            "num_head_channels": network.head_channels,
        }
        if config.codec.used and config.codec.factor is not None:
            found["scale_factor"] = config.codec.factor
        return {**found, "stage_interval": [*cuts, schedule.steps]} if cuts else found
    if network.family != "ncsnpp" or len(stages) == 1:
        return {}
    assert isinstance(network, SongUNetConfig)
    times = [0.0, *(schedule.edge_time(edge) for edge in stages.interior), 1.0]
    intervals = [[[round(low, 7), round(high, 7)]] for low, high in pairwise(times)]
    return {"model.group": network.norm_groups, "model.stage_interval": intervals}


def _buffers(config: RunConfig) -> Tensors:
    """Return the buffers that latent diffusion stores beside its networks, as it computes them from its betas."""
    schedule = config.diffusion.schedule
    if config.network.family != "ldm" or not isinstance(schedule, Discrete):
        return {}
    buffers = {name: value.float() for name, value in diffusion_buffers(betas_of(schedule)).items()}
    if config.codec.used and config.codec.factor is not None:
        buffers["scale_factor"] = torch.tensor(config.codec.factor, dtype=torch.float64)
    return buffers


def diffusion_buffers(betas: Tensor) -> Tensors:
    """Return the constants of a diffusion with these betas (Ho et al. 2020), by latent diffusion's names, float64."""
    alphas = 1.0 - betas
    kept = torch.cumprod(alphas, 0)
    before = torch.cat([kept.new_ones(1), kept[:-1]])
    variance = betas * (1.0 - before) / (1.0 - kept)
    return {
        "betas": betas,
        "alphas_cumprod": kept,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": kept.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1.0 - kept).sqrt(),
        "log_one_minus_alphas_cumprod": (1.0 - kept).log(),
        "sqrt_recip_alphas_cumprod": (1.0 / kept).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1.0 / kept - 1.0).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1.0 - kept),
        "posterior_mean_coef2": (1.0 - before) * alphas.sqrt() / (1.0 - kept),
    }


def _settings(config: RunConfig) -> dict[str, Any]:
    """Return what exports store beside the original code's own settings."""
    settings = {EDGES: list(config.stages.interior), SAMPLING: to_dict(config.sampling)}
    if isinstance(config.network, LDMConfig):
        settings[HEADS] = config.network.head_channels
    return settings


def _arguments(config: RunConfig, size: tuple[int, int]) -> dict[str, Any]:
    """Return the arguments with which EDM's EDMPrecond builds the same network; {} for other families."""
    network, edges = config.network, config.stages.edges
    if not isinstance(network, DDPMppConfig):
        return {}
    arguments = {
        "img_resolution": size[0],
        "img_channels": network.channels,
        "label_dim": network.num_classes,
        "sigma_data": config.diffusion.sigma_data,
        **DDPMPP,
        "channel_mult": list(network.channel_mult),
        "num_blocks": network.blocks_per_level,
        "attn_resolutions": [size[0] // factor for factor in network.attention_factors],
        "augment_dim": network.augment_dim,
        "dropout": network.dropout,
    }
    if len(config.stages) == 1:
        return {**arguments, "model_type": "SongUNet", "model_channels": network.encoder_width}
    return {
        **arguments,
        "model_type": "MultistageUNet",
        "en_model_channels": network.encoder_width,
        "de_model_channels": list(network.decoder_widths),
        "stage_num": len(config.stages),
        STAGE_INTERVAL: [[list(pair)] for pair in pairwise(edges)],  # the last end is Infinity, as Python writes it
    }
