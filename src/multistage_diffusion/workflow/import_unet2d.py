"""Import of a UNet2DModel of diffusers, with its scheduler and its autoencoder, as a run with one stage."""

from __future__ import annotations

import dataclasses
import math
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from safetensors.torch import save

from ..config import (
    CodecConfig,
    DataConfig,
    DiffusionConfig,
    OptimizerConfig,
    RunConfig,
    SamplingConfig,
    TrainingConfig,
)
from ..config.sampling import MOST_CALLS
from ..errors import UserError
from ..files import disk_errors, write_atomic
from ..interop.diffusers_folder import CONFIG, WEIGHTS, DiffusersFolder, read_folder, read_weights
from ..interop.file_terms import file_terms
from ..interop.noise_config import Noise, read_noise
from ..interop.unet2d import unet2d_state
from ..interop.unet2d_config import network_of_unet2d, size_of_unet2d
from ..latent.codecs import autoencoder_settings
from ..nets.ldm import LDMConfig
from ..reading import brief
from ..samplers import make_plan
from ..schedules.discrete import Discrete
from ..training.run import Run
from .imported import (
    OwnSampler,
    continued_training,
    data_without_source,
    save_first_checkpoint,
    write_own_sampler,
)

CALLS = 50  # denoiser calls of diffusers' DDIMPipeline, unless told otherwise
DDPM_CALLS = 1000  # of its DDPMPipeline
LR = 1e-4  # learning rate of diffusers' train_unconditional.py
_SCALE = 0.18215  # diffusers' scaling_factor of an autoencoder whose config.json has none


def import_unet2d(
    folder: Path | str,
    out: Path | str,
    *,
    base: RunConfig | None = None,
    size: tuple[int, int] | None = None,
    own_sampler: bool = False,
    replace: bool = False,
) -> Run:
    """Create a run from the folder of an unconditional or class-conditional pipeline of diffusers (DDPM, DDIM, ...).

    The network computes what UNet2DModel computes. Betas, steps, prediction and clipping are those of the folder's
    scheduler_config.json; the run is sampled by the DDIM that diffusers makes of it, unless own_sampler is true.
    The run has one stage, one checkpoint at step 0, and no data.

    Args:
        folder: the folder of a pipeline, of a checkpoint of train_unconditional.py (its averaged network in unet_ema is
            the run's average), or of a UNet2DModel beside its scheduler.
        out: the run's new folder.
        base: gives training, optimizer and evaluation; default: the library's defaults, with diffusers' learning rate.
        size: (height, width) of the network's input, if the folder does not hold it.
        own_sampler: take the pipeline's sampler: DDPM's in 1000 calls for a DDPMScheduler.
        replace: move an existing run aside.

    Raises:
        UserError: in one line, naming file and setting: a file is missing or damaged, or a setting cannot be read.
    """
    folder, out = Path(folder), Path(out)
    found = read_folder(folder)
    try:
        network, noise = network_of_unet2d(found.network), read_noise(found.scheduler)
        shape = (network.channels, *_size(found, network, size))
        model = unet2d_state(found.model, network)
        ema = model if found.ema is found.model else unet2d_state(found.ema, network)
        config = _config(found, network, noise, shape, base, out)
        own = OwnSampler(scheduler=noise.scheduler, sampling=_own_sampling(noise, config.sampling))
        if own_sampler:
            config = dataclasses.replace(config, sampling=_required(own))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None

    def fill(run: Run) -> None:
        if found.codec is not None:
            with disk_errors(out / "codec"):
                _copy_codec(found.codec, run.path / "codec")
        write_own_sampler(run, folder.name, own)
        save_first_checkpoint(run, config, model=model, ema=ema)

    return Run.create(out, config, replace=replace, fill=fill)


def diffusers_ddim(
    calls: int = CALLS,
    *,
    low: float | None = None,
    trailing: bool = False,
    lands: bool = True,
    clip: float | None = None,
) -> SamplingConfig:
    """Return the sampler of diffusers' DDIMScheduler.

    Args:
        calls: its num_inference_steps.
        low: sigma of steps_offset in timestep_spacing "leading"; None: of step 0.
        trailing: whether timestep_spacing is "trailing" instead.
        lands: set_alpha_to_one.
        clip: clip_sample_range; None: no clip_sample.
    """
    return SamplingConfig(
        solver="ddim",
        calls=calls,
        spacing="trailing" if trailing else "leading",
        sigma_min=None if trailing else low,
        denoise_last="always" if lands else "never",
        clip=clip,
    )


def _own_sampling(noise: Noise, ddim: SamplingConfig) -> SamplingConfig | None:
    """Return the sampler of a pipeline, with the calls that it makes unless told otherwise; None if no solver makes its steps.

    Args:
        noise: of its scheduler.
        ddim: the DDIM that diffusers makes of it.
    """
    if noise.solver == "ddim":
        return ddim
    if not noise.solver or (noise.solver == "ddpm-large" and (noise.offset or noise.trailing)):
        return None  # from a last step above 0, diffusers adds noise of that variance to the image
    own = dataclasses.replace(
        _sampling(dataclasses.replace(noise, lands=True), ddim.clip, DDPM_CALLS), solver=noise.solver
    )
    schedule = noise.diffusion.schedule
    assert isinstance(schedule, Discrete)
    return None if noise.linspace and own.calls != schedule.steps else own


def _required(own: OwnSampler) -> SamplingConfig:
    if own.sampling is None:
        raise UserError(f"sampler='own': {own.scheduler}: no solver here makes its steps; leave it out for DDIM")
    return own.sampling


def _sampling(noise: Noise, clip: float | None, most: int = CALLS) -> SamplingConfig:
    """Return the DDIM of a scheduler_config.json: with diffusers' 50 calls, or the next number that has its steps.

    Raises:
        UserError: if no number of calls has them.
    """
    schedule, offset = noise.diffusion.schedule, noise.offset
    assert isinstance(schedule, Discrete)
    low = float(schedule.sigma(float(offset))) if offset else None
    fewer = range(min(most, schedule.steps), 2, -1)
    # more calls are closer together, which leaves less room for an offset; they help where calls have to divide the steps
    more = range(most + 1, min(schedule.steps, MOST_CALLS) + 1) if noise.trailing else range(0)
    for calls in (*fewer, *(calls for calls in more if schedule.steps % calls == 0), 2):
        found = diffusers_ddim(calls, low=low, trailing=noise.trailing, lands=noise.lands, clip=clip)
        with suppress(UserError):
            make_plan(found, schedule)
            return found
    raise UserError(
        f"num_train_timesteps={schedule.steps}: no number of DDIM's calls, up to {MOST_CALLS}, fits its timestep_spacing and "
        "steps_offset"
    )


def _size(found: DiffusersFolder, network: LDMConfig, given: tuple[int, int] | None) -> tuple[int, int]:
    own = size_of_unet2d(found.network)
    if own is not None and given not in (None, own):
        raise UserError(f"size={given}: sample_size in {CONFIG} is {list(own)}; leave the size out")
    size = own or given
    if size is None:
        raise UserError(f"sample_size is null in {CONFIG}; give the size of the network's input (--size H W)")
    name, levels = ("--size" if own is None else "sample_size"), len(network.channel_mult)
    with file_terms(
        {"network.channel_mult": f"{name}={list(size)} for a network of {levels} levels (block_out_channels)"}
    ):
        network.require_size(*size)
    return size


def _config(
    found: DiffusersFolder,
    network: LDMConfig,
    noise: Noise,
    shape: tuple[int, int, int],
    base: RunConfig | None,
    out: Path,
) -> RunConfig:
    base = base or RunConfig(
        data=DataConfig(source=""),
        diffusion=DiffusionConfig(),
        network=network,
        optimizer=OptimizerConfig(lr=LR, warmup_steps=500),
        training=TrainingConfig(),
    )
    codec, pixels = CodecConfig(), shape
    if found.codec is not None:
        codec, pixels = _codec(found.codec, shape, out)
        if noise.clip is not None:
            warnings.warn(
                "clip_sample (or thresholding) is left out: latents are not clipped, so samples differ from those of this "
                "scheduler; it is true by default and rarely meant for latents",
                stacklevel=3,
            )
    return dataclasses.replace(
        base,
        name=out.name,
        data=data_without_source(base.data, pixels),
        codec=codec,
        network=network,
        diffusion=noise.diffusion,
        stages=dataclasses.replace(base.stages, interior=(), origin={}),
        training=continued_training(base.training, network),
        sampling=_sampling(noise, None if codec.used else noise.clip),
    )


def _codec(folder: Path, shape: tuple[int, int, int], out: Path) -> tuple[CodecConfig, tuple[int, int, int]]:
    """Return the configuration of an autoencoder, and the shape of its images.

    Raises:
        UserError: if its configuration is damaged, or does not fit the network.
    """
    settings = autoencoder_settings(folder, folder.name)
    scale, shift = settings.get("scaling_factor", _SCALE), settings.get("shift_factor") or 0.0
    if type(shift) not in (int, float) or not math.isfinite(shift):
        raise UserError(f"{folder.name}: shift_factor={brief(shift)} must be a number")
    if shift and settings["_class_name"] != "AutoencoderKL":
        raise UserError(f"{folder.name}: shift_factor={brief(shift)}: is read of an AutoencoderKL only")
    if type(scale) not in (int, float) or not scale > 0:
        raise UserError(f"{folder.name}: scaling_factor={brief(scale)} must be a positive number")
    levels, colours = settings.get("block_out_channels", [64]), settings.get("in_channels", 3)
    if not isinstance(levels, list) or not levels or type(colours) is not int or colours < 1:
        raise UserError(f"{folder.name}: {CONFIG} is not that of an autoencoder")
    channels = settings.get("vq_embed_dim") or settings.get("latent_channels", shape[0])
    if channels != shape[0]:
        raise UserError(f"{folder.name}: its latents have {brief(channels)} channels, but the network has {shape[0]}")
    read_weights(folder)  # refuses what is damaged, before anything is written
    factor = 2 ** (len(levels) - 1)
    source = str((out / "codec").resolve())
    config = CodecConfig(source=source, scale=float(scale), shift=float(shift), shape=shape)
    return config, (colours, shape[1] * factor, shape[2] * factor)


def _copy_codec(source: Path, target: Path) -> None:
    """Copy an autoencoder's configuration and weights; weights of an archive of torch are written as safetensors."""
    target.mkdir()
    write_atomic(target / CONFIG, (source / CONFIG).read_bytes())
    if (source / WEIGHTS).is_file():
        shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
    else:
        weights = {name: value.contiguous() for name, value in read_weights(source).items()}
        write_atomic(target / WEIGHTS, save(weights, {"format": "pt"}))
