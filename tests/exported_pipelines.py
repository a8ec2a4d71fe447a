"""Runs exported as pipelines of diffusers, and their samples where this package is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_config, tiny_data
from torch import Tensor

from multistage_diffusion.config import RunConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.samplers import make_plan, sample, start_noise
from multistage_diffusion.samplers.sampling import _steered
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.export_diffusers import export_diffusers

diffusers = pytest.importorskip("diffusers")

EDM_DDIM = {"sampling__solver": "ddim", "sampling__spacing": "edm", "sampling__calls": 8}

# Runs in a process without this package: each folder holds inputs.pt and gets outputs.pt. After saving, it loads again.
SCRIPT = """
import sys
sys.modules["multistage_diffusion"] = None
import torch
from pathlib import Path
from diffusers import DiffusionPipeline
for folder in map(Path, sys.argv[1:]):
    try:
        DiffusionPipeline.from_pretrained(folder)
        raise SystemExit("loaded code without being told to trust it")
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    x, labels = torch.load(folder / "inputs.pt")
    kinds, seen = [], []
    for place in (folder, folder / "saved"):
        pipe = DiffusionPipeline.from_pretrained(place, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        end = lambda p, number, t, kept: seen.append(number) or kept
        calls = [
            pipe(latents=x, class_labels=labels, output_type=kind, callback_on_step_end=end).images
            for kind in ("latent", "pt", "pil")
        ]
        pixels = [list(image.getdata()) for image in calls[2]]
        kinds.append([calls[0], calls[1], pixels])
        pipe.save_pretrained(folder / "saved")
    assert torch.equal(kinds[0][0], kinds[1][0]), "a saved pipeline is another"
    few = pipe(batch_size=2, num_inference_steps=5, class_labels=None if labels is None else 0).images
    torch.save((kinds[0], type(pipe.scheduler).__name__, len(seen), len(few)), folder / "outputs.pt")
"""


def a_run(path: Path, **changes: Any) -> Run:
    """A run whose averaged weights are random."""
    run = Run.create(path, tiny_config(**changes))
    config = run.config()
    channels, *_ = config.input_shape
    trainer = Trainer(run, tiny_data(classes=config.network.num_classes, shape=(channels, 4, 4)), device="cpu")
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainer.ema.module.parameters():
            parameter.normal_(std=0.25, generator=g)
    trainer.save()
    return run


def our_samples(run: Run, x: Tensor, labels: Tensor | None) -> Tensor:
    config = run.config()
    plan = make_plan(config.sampling, config.diffusion.schedule)
    cond = None if labels is None else Conditioning(labels=labels)
    return sample(_steered(run.denoiser(), config.sampling, latent=False), x * plan.initial_noise_std, plan, cond)


def unit_noise(config: RunConfig, count: int) -> Tensor:
    """The noise from which msdiff sample starts, with a standard deviation of 1."""
    plan = make_plan(config.sampling, config.diffusion.schedule)
    return start_noise(0, torch.arange(count), config.input_shape, plan) / plan.initial_noise_std


def exported(run: Run, count: int = 3) -> tuple[Path, Tensor, Tensor | None]:
    folder = export_diffusers(run, run.path.with_name(f"{run.path.name}-pipeline"))
    x = unit_noise(run.config(), count)
    labels = torch.tensor([0, 2, 1])[:count] if run.config().network.num_classes else None
    torch.save((x, labels), folder / "inputs.pt")
    return folder, x, labels


def elsewhere(folders: list[Path], tmp_path: Path) -> list[tuple[Any, ...]]:
    """Draw samples of pipelines in a process that cannot import this package."""
    environment = {**os.environ, "PYTHONPATH": "", "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, *map(str, folders)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / "outputs.pt") for folder in folders]


def in_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder / "modules"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe
