"""Train diffusion models faster: one shared encoder, a tailored decoder for every noise range.

import multistage_diffusion as msd

result = msd.find_stages("digits")
run = msd.train(msd.preset("digits"), Path("runs/digits"), result=result)
images = msd.sample(run, count=64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import CodecConfig as CodecConfig
    from .config import DataConfig as DataConfig
    from .config import DiffusionConfig as DiffusionConfig
    from .config import EvaluationConfig as EvaluationConfig
    from .config import ExecutionConfig as ExecutionConfig
    from .config import NetworkConfig as NetworkConfig
    from .config import OptimizerConfig as OptimizerConfig
    from .config import RunConfig as RunConfig
    from .config import SamplingConfig as SamplingConfig
    from .config import TrainingConfig as TrainingConfig
    from .config.presets import preset as preset
    from .config.serialization import override as override
    from .contracts import Conditioning as Conditioning
    from .contracts import Denoiser as Denoiser
    from .conventions import Boundary as Boundary
    from .conventions import boundary as boundary
    from .data import ImageData as ImageData
    from .data import to_float as to_float
    from .data import to_uint8 as to_uint8
    from .data.mixture import GaussianMixture as GaussianMixture
    from .data.sources import open_data as open_data
    from .denoisers import build_denoiser as build_denoiser
    from .errors import UserError as UserError
    from .optimal import OptimalDenoiser as OptimalDenoiser
    from .reporting.describe import describe as describe
    from .reporting.pictures import grid as grid
    from .samplers.sampling import sample_images as sample_images
    from .schedules import LogNormal as LogNormal
    from .schedules import UniformTime as UniformTime
    from .schedules.discrete import Discrete as Discrete
    from .schedules.discrete import UniformSteps as UniformSteps
    from .schedules.edm import EDM as EDM
    from .schedules.rectified_flow import RectifiedFlow as RectifiedFlow
    from .schedules.ve import VE as VE
    from .schedules.vp import VP as VP
    from .stage_finding import StageResult as StageResult
    from .stage_finding import StageSettings as StageSettings
    from .stages import Stages as Stages
    from .training.run import Run as Run
    from .version import __version__ as __version__
    from .workflow.auto import auto_config as auto_config
    from .workflow.codec import train_codec as train_codec
    from .workflow.compare_runs import compare_runs as compare_runs
    from .workflow.evaluate import compare as compare
    from .workflow.evaluate import evaluate as evaluate
    from .workflow.evaluate import statistics as statistics
    from .workflow.export import export_published as export_published
    from .workflow.export_diffusers import export_diffusers as export_diffusers
    from .workflow.export_unet2d import export_unet2d as export_unet2d
    from .workflow.import_run import import_published as import_published
    from .workflow.pack import pack as pack
    from .workflow.plan import plan as plan
    from .workflow.push import push as push
    from .workflow.report import report as report
    from .workflow.resume import resume as resume
    from .workflow.sample import sample as sample
    from .workflow.stages import find_stages as find_stages
    from .workflow.train import train as train

# name -> module, imported at first access: `msdiff --help` does not import torch
_HOME = {
    "auto_config": "workflow.auto",
    "compare": "workflow.evaluate",
    "compare_runs": "workflow.compare_runs",
    "evaluate": "workflow.evaluate",
    "export_diffusers": "workflow.export_diffusers",
    "export_published": "workflow.export",
    "export_unet2d": "workflow.export_unet2d",
    "import_published": "workflow.import_run",
    "pack": "workflow.pack",
    "plan": "workflow.plan",
    "push": "workflow.push",
    "report": "workflow.report",
    "resume": "workflow.resume",
    "sample": "workflow.sample",
    "find_stages": "workflow.stages",
    "statistics": "workflow.evaluate",
    "train": "workflow.train",
    "train_codec": "workflow.codec",
    "CodecConfig": "config",
    "DataConfig": "config",
    "DiffusionConfig": "config",
    "EvaluationConfig": "config",
    "ExecutionConfig": "config",
    "NetworkConfig": "config",
    "OptimizerConfig": "config",
    "RunConfig": "config",
    "SamplingConfig": "config",
    "TrainingConfig": "config",
    "Boundary": "conventions",
    "boundary": "conventions",
    "Conditioning": "contracts",
    "Denoiser": "contracts",
    "GaussianMixture": "data.mixture",
    "ImageData": "data",
    "open_data": "data.sources",
    "to_float": "data",
    "to_uint8": "data",
    "EDM": "schedules.edm",
    "VE": "schedules.ve",
    "VP": "schedules.vp",
    "Discrete": "schedules.discrete",
    "RectifiedFlow": "schedules.rectified_flow",
    "LogNormal": "schedules",
    "UniformSteps": "schedules.discrete",
    "UniformTime": "schedules",
    "StageResult": "stage_finding",
    "StageSettings": "stage_finding",
    "build_denoiser": "denoisers",
    "describe": "reporting.describe",
    "grid": "reporting.pictures",
    "OptimalDenoiser": "optimal",
    "override": "config.serialization",
    "preset": "config.presets",
    "Run": "training.run",
    "sample_images": "samplers.sampling",
    "Stages": "stages",
    "UserError": "errors",
    "__version__": "version",
}
__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
