"""Exported pipelines draw the same samples where this package is not installed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exported_pipelines import EDM_DDIM, a_run, elsewhere, exported, in_process, our_samples
from torch import Tensor

from multistage_diffusion import cli
from multistage_diffusion.config import NetworkConfig
from multistage_diffusion.data import to_uint8
from multistage_diffusion.errors import UserError
from multistage_diffusion.samplers import make_plan
from multistage_diffusion.schedules.discrete import Discrete, UniformSteps
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.export_diffusers import export_diffusers
from multistage_diffusion.workflow.import_unet2d import diffusers_ddim

diffusers = pytest.importorskip("diffusers")

STEPS = Discrete(steps=100, spacing="linear")
EDM_DPM = {
    "sampling__solver": "dpm++",
    "sampling__method": "multistep",
    "sampling__order": 2,
    "sampling__lower_final": "published",
    "sampling__calls": 12,
}
DISCRETE = {
    "diffusion__precondition": "vp-eps",
    "diffusion__schedule": STEPS,
    "diffusion__prior": UniformSteps(schedule=STEPS),
}
FLOW = {"diffusion__precondition": "velocity", "diffusion__schedule": RectifiedFlow()}
OPEN = {"sampling__sigma_min": None, "sampling__sigma_max": None}
STOCK: dict[str, tuple[str, dict[str, Any]]] = {
    "edm": ("EDMEulerScheduler", {**EDM_DDIM, "sampling__denoise_last": "always"}),
    "edm, ends at sigma_min": ("EDMEulerScheduler", {**EDM_DDIM, "sampling__denoise_last": "never"}),
    "edm, log-snr": ("EDMEulerScheduler", {**EDM_DDIM, "sampling__spacing": "log-snr"}),
    "edm, dpm++": ("EDMDPMSolverMultistepScheduler", {**EDM_DPM, "sampling__denoise_last": "never"}),
    "edm, dpm++, denoised": (
        "EDMDPMSolverMultistepScheduler",
        {**EDM_DPM, "sampling__denoise_last": "always", "sampling__spacing": "edm"},
    ),
    "discrete": ("DDIMScheduler", {**DISCRETE, "sampling": diffusers_ddim(10, clip=1.0)}),
    "discrete, v": (
        "DDIMScheduler",
        {
            **DISCRETE,
            "diffusion__precondition": "vp-v",
            "sampling": diffusers_ddim(10, low=float(STEPS.sigma(1.0))),
        },
    ),
    "discrete, to step 0": ("DDIMScheduler", {**DISCRETE, "sampling": diffusers_ddim(10, lands=False, clip=1.0)}),
    "discrete, trailing": ("DDIMScheduler", {**DISCRETE, "sampling": diffusers_ddim(10, trailing=True)}),
    "discrete, ldm": (
        "DDIMScheduler",
        {
            **DISCRETE,
            **OPEN,
            "sampling__solver": "ddim",
            "sampling__spacing": "ldm",
            "sampling__calls": 10,
            "sampling__denoise_last": "never",
        },
    ),
    "discrete, dpm++": (
        "DPMSolverMultistepScheduler",
        {
            **DISCRETE,
            **EDM_DPM,
            "sampling__spacing": "time",
            "sampling__denoise_last": "always",
            "sampling__sigma_min": float(STEPS.sigma(7.0)),  # 100 steps // (12 + 1)
            "sampling__sigma_max": float(STEPS.sigma(84.0)),
        },
    ),
    "velocity": (
        "FlowMatchEulerDiscreteScheduler",
        {
            **FLOW,
            **OPEN,
            "sampling__solver": "ddim",
            "sampling__spacing": "time",
            "sampling__calls": 8,
            "sampling__denoise_last": "always",
        },
    ),
}
OWN: dict[str, dict[str, Any]] = {
    "edm, singlestep": {"sampling__calls": 9},
    "edm, classes": {"network__num_classes": 3, "sampling__guidance": 2.0, "sampling__guidance_interval": (0.3, 3.0)},
    "edm, heun": {"sampling__solver": "heun", "sampling__calls": 11},
    "edm, dpm++ of order 3": {**EDM_DPM, "sampling__order": 3},
    "edm, thresholded": {**EDM_DDIM, "sampling__threshold": 0.9},
    "vp": {"diffusion__precondition": "vp-eps", "diffusion__schedule": VP(), "sampling__spacing": "time", **OPEN},
    "discrete, dpm": {**DISCRETE, **OPEN, "sampling__clip": 1.0},
    "discrete, leading, thresholded": {
        **DISCRETE,
        "sampling": dataclasses.replace(diffusers_ddim(10, lands=False), threshold=0.9),
    },
    "velocity, heun": {**FLOW, "sampling__solver": "heun", "sampling__calls": 9},
}


def require_same(found: tuple[Any, ...], run: Run, x: Tensor, labels: Tensor | None, tolerance: float) -> None:
    (end, images, levels), _, seen, few = found
    ours = our_samples(run, x, labels)
    assert ours.std() > 0.05
    scale = max(1.0, float(ours.abs().max()))
    assert (end - ours).abs().max() <= tolerance * scale
    assert (images - (ours / 2 + 0.5).clamp(0, 1)).abs().max() <= tolerance * scale
    ours8 = to_uint8(ours).flatten(1).numpy()
    theirs8 = np.array(levels).reshape(ours8.shape)
    difference = np.abs(theirs8.astype(int) - ours8.astype(int))
    assert difference.max() <= (1 if tolerance > 1e-6 else 0)
    assert (difference > 0).mean() <= 1e-4
    assert seen % 6 == 0
    assert seen >= 6 * (len(make_plan(run.config().sampling, run.config().diffusion.schedule).calls))
    assert few == 2


@pytest.mark.parametrize("name", ["edm", "discrete, ldm", "vp"])
def test_an_exported_run_samples_the_same_images(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = a_run(tmp_path / "run", **(STOCK[name][1] if name in STOCK else OWN[name]))
    folder, x, _ = exported(run)
    pipe = in_process(folder, monkeypatch)
    assert type(pipe.scheduler).__name__ == (STOCK[name][0] if name in STOCK else "MultistageScheduler")
    assert type(pipe.unet).__module__.startswith("diffusers_modules.")
    tolerance = 1e-5 if name == "edm" else 1e-6
    ours = our_samples(run, x, None)
    theirs = pipe(latents=x, output_type="latent").images
    assert (theirs - ours).abs().max() < tolerance * max(1.0, float(ours.abs().max()))


@pytest.mark.parametrize("family", ["uvit", "dit"])
def test_an_exported_transformer_loads_and_computes_the_same(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {"encoder_width": 16, "decoder_widths": (16, 16, 8), "head_channels": 8, "size": (4, 4), "patch": 2}
    network = NetworkConfig.of(
        family, channels=1, encoder_depth=2, decoder_depths=(2, 2, 1), num_classes=3, dropout=0.0, **widths
    )
    run = a_run(tmp_path / "run", **EDM_DDIM, network=network)
    folder, x, labels = exported(run)
    found = in_process(folder, monkeypatch)(latents=x, class_labels=labels, output_type="latent").images
    assert (found - our_samples(run, x, labels)).abs().max() < 1e-5


def test_pipelines_of_other_code_live_in_one_process_and_are_saved_with_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))

    def loaded(folder: Path) -> Any:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    widths = {"encoder_width": 16, "decoder_widths": (16, 16, 8), "head_channels": 8, "size": (4, 4), "patch": 2}
    network = NetworkConfig.of("uvit", channels=1, encoder_depth=2, decoder_depths=(2, 2, 1), dropout=0.0, **widths)
    runs = [
        a_run(tmp_path / "first", **OWN["edm, heun"]),
        a_run(tmp_path / "second", **OWN["edm, dpm++ of order 3"], network=network),
    ]
    made = [exported(run) for run in runs]
    pipes = [loaded(folder) for folder, _, _ in made]
    pipes.append(loaded(made[0][0]))  # the first one's code is executed again in the module it is in
    x = made[0][1]
    ours = [our_samples(run, x, None) for run in runs]
    for pipe, right in zip(pipes, [*ours, ours[0]], strict=True):
        assert (pipe(latents=x, output_type="latent").images - right).abs().max() < 1e-6
    pipes[0].save_pretrained(tmp_path / "saved")
    for file in made[0][0].rglob("*.py"):
        assert (tmp_path / "saved" / file.relative_to(made[0][0])).read_bytes() == file.read_bytes()
    assert torch.equal(
        loaded(tmp_path / "saved")(latents=x, output_type="latent").images,
        pipes[2](latents=x, output_type="latent").images,
    )


@pytest.mark.slow
def test_every_kind_of_run_samples_the_same_images_without_this_package(tmp_path: Path) -> None:
    cases = {**{name: changes for name, (_, changes) in STOCK.items()}, **OWN}
    runs = {name: a_run(tmp_path / f"run-{i}", **changes) for i, (name, changes) in enumerate(cases.items())}
    made = {name: exported(run) for name, run in runs.items()}
    found = elsewhere([folder for folder, _, _ in made.values()], tmp_path)
    for (name, run), outputs in zip(runs.items(), found, strict=True):
        assert outputs[1] == (STOCK[name][0] if name in STOCK else "MultistageScheduler"), name
        # diffusers' schedulers keep sigmas in float32
        require_same(outputs, run, *made[name][1:], tolerance=1e-5 if name in STOCK else 1e-6)


def test_files_are_complete_and_not_overwritten(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", **EDM_DDIM)
    out = tmp_path / "out"
    assert cli.main(["export", str(run.path), "--format", "diffusers", "--out", str(out)]) == 0
    index = json.loads((out / "model_index.json").read_text())
    modules = {name: index[name][0] for name in ("_class_name", "unet")}
    names = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert names == {
        "model_index.json",
        f"{modules['_class_name']}.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        f"unet/{modules['unet']}.py",
        "scheduler/scheduler_config.json",
    }
    assert [index[name][1] for name in modules] == ["MultistagePipeline", "MultistageUNet"]
    for name, plain in (("_class_name", "pipeline"), ("unet", "multistage_unet")):
        assert re.fullmatch(rf"{plain}_[0-9a-f]{{8}}", modules[name])
    with pytest.raises(UserError, match="exists"):
        export_diffusers(run, out)
    assert export_diffusers(run, out, overwrite=True) == out


@pytest.mark.parametrize("kind", ["diffusers", "unet2d"])
def test_only_a_pipeline_is_replaced(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run = a_run(Path("above") / "run", **EDM_DDIM)
    if kind == "unet2d":
        monkeypatch.setattr("multistage_diffusion.workflow.export_unet2d._files", lambda config: {})  # it is none

    def said(out: Path) -> str:
        assert cli.main(["export", str(run.path), "--format", kind, "--out", str(out), "--overwrite"]) == 2
        return capsys.readouterr().err

    Path("photos").mkdir()
    Path("photos", "1.png").touch()
    Path("file").touch()
    assert "is no pipeline (it holds no model_index.json), and is not replaced" in said(Path("photos"))
    assert "is no pipeline" in said(run.path)
    assert "is a file" in said(Path("file"))
    Path("above", "model_index.json").touch()
    assert "holds the run" in said(Path("above"))
    assert Path("photos", "1.png").exists()
    assert run.checkpoint("best").exists()
    if kind == "diffusers":
        command = ["export", str(run.path), "--format", kind, "--out", "new"]
        assert [cli.main(command), cli.main(command), cli.main([*command, "--overwrite"])] == [0, 2, 0]
