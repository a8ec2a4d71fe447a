"""Export of one-stage runs as UNet2DModels in pipelines of diffusers' own classes."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

from safetensors.torch import save

from ..config import RunConfig
from ..errors import UserError
from ..files import new_folder, write_file
from ..interop.diffusers_folder import CONFIG, SCHEDULER, WEIGHTS, read_mapping
from ..interop.noise_config import VARIANCES, noise_settings
from ..interop.pipeline_index import INDEX
from ..interop.stock_schedulers import ddim_steps
from ..interop.unet2d import unet2d_tensors
from ..interop.unet2d_config import CLASS, unet2d_settings
from ..latent.codecs import located_folder
from ..nets.ldm import LDMConfig
from ..reading import brief
from ..samplers import make_plan
from ..schedules.discrete import Discrete
from ..training.run import Run
from .exchange import exported_config
from .latent import recorded_scale


def export_unet2d(
    run: Run | Path | str, folder: Path | str, *, checkpoint: str = "best", overwrite: bool = False
) -> Path:
    """Write a one-stage run's averaged network as a UNet2DModel, in a DDIMPipeline (LDMPipeline for a run on latents).

    A run that is sampled by DDPM becomes a DDPMPipeline.

    Weights of a run that `import_published` made of a UNet2DModel come back bit for bit.

    Args:
        run: a run, or its folder.
        folder: the folder to write.
        checkpoint: "best", "latest" or a step.
        overwrite: replace an existing pipeline.

    Raises:
        UserError: if no UNet2DModel computes what the network computes, or the folder may not be written.
    """
    run, folder = run if isinstance(run, Run) else Run.open(Path(run)), Path(folder)
    config = exported_config(run, checkpoint)
    try:
        files = _files(config)
    except UserError as error:
        raise UserError(f"{run.path}: cannot be a {CLASS}: {error}") from None
    require_replaceable(folder, run, overwrite=overwrite)
    codec = codec_folder(config)
    network = config.network
    assert isinstance(network, LDMConfig)
    state = run.denoiser(checkpoint).network.state_dict()
    with new_folder(folder, replace=overwrite) as place:
        for name, settings in files.items():
            (place / name).parent.mkdir(exist_ok=True)
            write_file(place / name, json_text(settings))
        write_file(place / "unet" / WEIGHTS, save(unet2d_tensors(state, network), {"format": "pt"}))
        if codec is not None:
            copy_codec(codec, place / "vqvae", config)
    return folder


def require_replaceable(folder: Path, run: Run, *, overwrite: bool) -> None:
    """Check that an export may be written to a folder: what is there is removed.

    Raises:
        UserError: if it exists and may not be replaced, is no pipeline of diffusers, or holds the run.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise UserError(f"--out {folder}: exists; choose another name or give --overwrite")
    if not (folder / INDEX).is_file():
        raise UserError(
            f"--out {folder}: is no pipeline (it holds no {INDEX}), and is not replaced; choose another name"
        )
    if run.path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"--out {folder}: holds the run; choose another name")


def json_text(settings: Any) -> bytes:
    """Return settings as the text of a JSON file."""
    return (json.dumps(settings, indent=2, sort_keys=True) + "\n").encode()


def _files(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Return the configuration files of the pipeline by name."""
    scheduler = _scheduler(config)
    parts: dict[str, Any] = {"unet": ["diffusers", CLASS], "scheduler": ["diffusers", scheduler["_class_name"]]}
    if config.codec.shift:
        raise UserError(
            f"codec.shift={config.codec.shift:g}: diffusers' LDMPipeline has no shift; use --format diffusers"
        )
    if config.codec.used:
        parts = {
            "_class_name": "LDMPipeline",
            "vqvae": ["diffusers", codec_class(located_folder(config.codec))],
            **parts,
        }
    else:
        parts = {"_class_name": scheduler["_class_name"].replace("Scheduler", "Pipeline"), **parts}
    if config.sampling.threshold is not None:
        warnings.warn(
            f"sampling.threshold={config.sampling.threshold:g} is left out: diffusers' DDIM scheduler has another; --format "
            "diffusers keeps it",
            stacklevel=3,
        )
    return {
        INDEX: parts,
        f"unet/{CONFIG}": unet2d_settings(config.network, config.input_shape[1:]),
        f"scheduler/{SCHEDULER}": scheduler,
    }


def _scheduler(config: RunConfig) -> dict[str, Any]:
    """Return the scheduler_config.json: of DDPM's for a run that is sampled so, else of DDIM's."""
    noise = noise_settings(config.diffusion, config.sampling.clip)
    steps, variances = _steps(config), {solver: variance for variance, solver in reversed(VARIANCES.items())}
    if config.sampling.solver not in variances:
        return {"_class_name": "DDIMScheduler", **noise, **steps}
    steps.pop("set_alpha_to_one")  # diffusers' DDPM always ends at the image
    return {"_class_name": "DDPMScheduler", **noise, **steps, "variance_type": variances[config.sampling.solver]}


def _steps(config: RunConfig) -> dict[str, Any]:
    """Return the settings of the steps: those of the run's sampler if it makes diffusers' DDIM steps, else diffusers' own."""
    schedule = config.diffusion.schedule
    assert isinstance(schedule, Discrete)  # noise_settings refuses others
    plan = make_plan(config.sampling, schedule)
    found = ddim_steps(config.sampling, plan, schedule)
    return found or {"set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "leading"}


def codec_folder(config: RunConfig) -> Path | None:
    """Return the folder of a run's autoencoder, for one of the hub in the hub's cache; None for a run on pixels.

    Raises:
        UserError: if it is missing, damaged or another than the run's, or diffusers has no place for the run's shift.
    """
    if not config.codec.used:
        return None
    folder = located_folder(config.codec)
    kind = codec_class(folder)
    if config.codec.shift and kind != "AutoencoderKL":
        raise UserError(f"codec.shift={config.codec.shift:g}: diffusers has no shift of latents of {brief(kind)}")
    return folder


def codec_class(folder: Path) -> str:
    """Return the name of the class of diffusers of the autoencoder in a folder."""
    kind: str = read_mapping(folder / CONFIG)["_class_name"]
    return kind


def copy_codec(source: Path, target: Path, config: RunConfig) -> None:
    """Copy an autoencoder; its scaling_factor and shift_factor become the scale and shift of the run's latents."""
    target.mkdir()
    settings = {**read_mapping(source / CONFIG), "scaling_factor": recorded_scale(config.codec)}
    settings.pop("shift_factor", None)  # the run may have another, or none
    if config.codec.shift:
        settings["shift_factor"] = config.codec.shift
    write_file(target / CONFIG, json_text(settings))
    shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
