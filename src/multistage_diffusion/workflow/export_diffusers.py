"""Export of runs as pipelines of diffusers that need no part of this package."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from ..config import RunConfig
from ..config.sampling import SOLVERS, SPACINGS
from ..config.serialization import to_dict
from ..files import new_folder, write_file
from ..interop import hub
from ..interop.diffusers_folder import CONFIG, SCHEDULER, WEIGHTS
from ..interop.pipeline_index import INDEX
from ..interop.self_contained import self_contained
from ..interop.stock_schedulers import Stock, stock_scheduler
from ..preconditioning import make_preconditioning
from ..samplers import make_plan
from ..training.run import Run
from .exchange import exported_config
from .export_unet2d import codec_class, codec_folder, copy_codec, json_text, require_replaceable

UNET, OWN_SCHEDULER, PIPELINE = "multistage_unet", "multistage_scheduler", "pipeline"  # modules of interop.hub
UNET_CLASS, SCHEDULER_CLASS, PIPELINE_CLASS = "MultistageUNet", "MultistageScheduler", "MultistagePipeline"
_HUB = hub.__name__


@dataclass(frozen=True)
class _Part:
    """A part of the pipeline: where model_index.json finds it, and its files by name."""

    index: list[str]
    files: dict[str, bytes]


def export_diffusers(
    run: Run | Path | str,
    folder: Path | str,
    *,
    checkpoint: str = "best",
    overwrite: bool = False,
    beside: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a run as a pipeline of diffusers, with its averaged weights, its sampler, its autoencoder and their code.

    The folder is loaded by DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True) wherever diffusers is
    installed; this package is not needed. Its code is generated from ours. diffusers' own schedulers are used where they
    make exactly the run's steps; else our sampler is written as one.

    Args:
        run: a run, or its folder.
        folder: the folder to write.
        checkpoint: "best", "latest" or a step.
        overwrite: replace an existing pipeline.
        beside: further files of the folder, by name.

    Raises:
        UserError: if the network is not of this package, or the folder may not be written.
    """
    run, folder = run if isinstance(run, Run) else Run.open(Path(run)), Path(folder)
    config = exported_config(run, checkpoint)
    require_replaceable(folder, run, overwrite=overwrite)
    codec, stock = codec_folder(config), stock_scheduler(config)
    state = run.denoiser(checkpoint).state_dict()
    parts = {"unet": _unet(config, state, stock), "scheduler": _scheduler(config, stock)}
    source = _pipeline_source()
    module = _module_name(PIPELINE, source)
    index: dict[str, Any] = {
        "_class_name": [module, PIPELINE_CLASS],
        **{name: part.index for name, part in parts.items()},
        "vae": [None, None] if codec is None else ["diffusers", codec_class(codec)],
        "calls": config.sampling.calls if stock is None else stock.calls,
        "guidance": config.sampling.guidance,
        "guidance_interval": config.sampling.guidance_interval,
        "initial_std": None if stock is None else stock.initial_std,
        "times": None if stock is None else stock.times,
        "final_scale": 1.0 if stock is None else stock.final_scale,
    }
    with new_folder(folder, replace=overwrite) as place:
        for name, part in parts.items():
            (place / name).mkdir()
            for file, content in part.files.items():
                write_file(place / name / file, content)
        if codec is not None:
            copy_codec(codec, place / "vae", config)
        write_file(place / f"{module}.py", source.encode())
        for name, content in (beside or {}).items():
            write_file(place / name, content)
        write_file(place / INDEX, json_text(index))
    return folder


def _module_name(name: str, source: str) -> str:
    """Return the name of a file of code, with a digest of its source.

    diffusers copies the code of every local folder into one folder of modules, so that files of one name replace each
    other there, and in pipelines already loaded.
    """
    return f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:8]}"


def _unet(config: RunConfig, state: dict[str, torch.Tensor], stock: Stock | None) -> _Part:
    """Return the network: its generated source, settings and weights."""
    family = type(config.network)
    source = self_contained(
        [(f"{_HUB}.{UNET}", UNET_CLASS), (family.__module__, family.__qualname__)],
        title=f"The network of a run: {config.network.title or config.network.family}, a decoder for each noise range.",
        last=[f"{UNET_CLASS}.settings_class = {family.__qualname__}"],
    )
    settings = {name: value for name, value in to_dict(config.network).items() if name != "family"}
    flow = stock is not None and stock.times is not None
    edges = torch.tensor(config.stages.interior, dtype=torch.float64)
    noise = 1000.0 * edges / (1.0 + edges) if flow else make_preconditioning(config.diffusion).coefficients(edges).noise
    channels, *size = config.input_shape
    content = {
        "_class_name": UNET_CLASS,
        "settings": settings,
        "time": "flow" if flow else "network",
        "edges": noise.tolist(),
        "sample_size": size,
        "in_channels": channels,
    }
    weights = {name: value.contiguous() for name, value in state.items()}
    module = _module_name(UNET, source)
    return _Part(
        [module, UNET_CLASS],
        {f"{module}.py": source.encode(), CONFIG: json_text(content), WEIGHTS: save(weights, {"format": "pt"})},
    )


def _scheduler(config: RunConfig, stock: Stock | None) -> _Part:
    """Return the scheduler: diffusers' own if it is exact, else ours with its generated source."""
    if stock is not None:
        return _Part(["diffusers", stock.kind], {SCHEDULER: json_text({"_class_name": stock.kind, **stock.settings})})
    make_plan(config.sampling, config.diffusion.schedule)  # refuses what cannot be sampled
    schedule, preconditioning = type(config.diffusion.schedule), type(make_preconditioning(config.diffusion))
    used: list[type] = [SOLVERS[config.sampling.solver], SPACINGS[config.sampling.spacing], schedule, preconditioning]
    source = self_contained(
        [(f"{_HUB}.{OWN_SCHEDULER}", SCHEDULER_CLASS), *((kind.__module__, kind.__qualname__) for kind in used)],
        title=f"The sampler of a run: {config.sampling.solver}.",
        last=[
            f"{SCHEDULER_CLASS}.schedule_class = {schedule.__qualname__}",
            f"{SCHEDULER_CLASS}.preconditioning_class = {preconditioning.__qualname__}",
        ],
    )
    edm = config.diffusion.precondition == "edm"
    settings = {
        "_class_name": SCHEDULER_CLASS,
        "sampling": to_dict(config.sampling),
        "schedule": {name: value for name, value in to_dict(config.diffusion.schedule).items() if name != "kind"},
        "sigma_data": config.diffusion.sigma_data if edm else None,
    }
    module = _module_name(OWN_SCHEDULER, source)
    return _Part([module, SCHEDULER_CLASS], {f"{module}.py": source.encode(), SCHEDULER: json_text(settings)})


def _pipeline_source() -> str:
    return self_contained([(f"{_HUB}.{PIPELINE}", PIPELINE_CLASS)], title="Sampling of a run in diffusers.")
