"""Train diffusion models faster: one shared encoder, a tailored decoder for every noise range.

import multistage_diffusion as msd

result = msd.split("digits")
run = msd.train(msd.preset("digits"), Path("runs/digits"), result=result)
images = msd.sample(run, count=64)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import DataConfig as DataConfig
    from .config import DiffusionConfig as DiffusionConfig
    from .config import NetworkConfig as NetworkConfig
    from .config import OptimizerConfig as OptimizerConfig
    from .config import RunConfig as RunConfig
    from .config import SamplingConfig as SamplingConfig
    from .config import TrainingConfig as TrainingConfig
    from .contracts import Conditioning as Conditioning
    from .contracts import Denoiser as Denoiser
    from .data import GaussianMixture as GaussianMixture
    from .data import ImageData as ImageData
    from .data import open_data as open_data
    from .denoisers import build_denoiser as build_denoiser
    from .description import describe as describe
    from .optimal import OptimalDenoiser as OptimalDenoiser
    from .pictures import grid as grid
    from .presets import preset as preset
    from .sampling import sample_images as sample_images
    from .schedules import EDM as EDM
    from .schedules import VE as VE
    from .schedules import VP as VP
    from .schedules import Discrete as Discrete
    from .schedules import RectifiedFlow as RectifiedFlow
    from .serialization import override as override
    from .splitting import SplitResult as SplitResult
    from .splitting import SplitSettings as SplitSettings
    from .stages import Stages as Stages
    from .training.run import Run as Run
    from .workflow import compare as compare
    from .workflow import evaluate as evaluate
    from .workflow import export_published as export_published
    from .workflow import import_published as import_published
    from .workflow import plan as plan
    from .workflow import report as report
    from .workflow import resume as resume
    from .workflow import sample as sample
    from .workflow import split as split
    from .workflow import statistics as statistics
    from .workflow import train as train
    from .workflow import train_codec as train_codec

__version__ = "0.1.0"

# name -> module; imported when first asked for, so that `msdiff --help` need not wait for torch
_HOME = {
    **dict.fromkeys(
        (
            "compare",
            "evaluate",
            "export_published",
            "import_published",
            "plan",
            "report",
            "resume",
            "sample",
            "split",
            "statistics",
            "train",
            "train_codec",
        ),
        "workflow",
    ),
    **dict.fromkeys(
        (
            "DataConfig",
            "DiffusionConfig",
            "NetworkConfig",
            "OptimizerConfig",
            "RunConfig",
            "SamplingConfig",
            "TrainingConfig",
        ),
        "config",
    ),
    **dict.fromkeys(("Conditioning", "Denoiser"), "contracts"),
    **dict.fromkeys(("GaussianMixture", "ImageData", "open_data"), "data"),
    **dict.fromkeys(("EDM", "VE", "VP", "Discrete", "RectifiedFlow"), "schedules"),
    **dict.fromkeys(("SplitResult", "SplitSettings"), "splitting"),
    "build_denoiser": "denoisers",
    "describe": "description",
    "grid": "pictures",
    "OptimalDenoiser": "optimal",
    "override": "serialization",
    "preset": "presets",
    "Run": "training.run",
    "sample_images": "sampling",
    "Stages": "stages",
}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
