"""Exported pipelines draw the same samples where this package is not installed."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_config, tiny_data
from torch import Tensor

from multistage_diffusion import cli
from multistage_diffusion.config import NetworkConfig, RunConfig
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.data import to_uint8
from multistage_diffusion.errors import UserError
from multistage_diffusion.latent.codecs import codec_fingerprint
from multistage_diffusion.samplers import make_plan, sample, start_noise
from multistage_diffusion.samplers.sampling import _steered
from multistage_diffusion.schedules.discrete import Discrete, UniformSteps
from multistage_diffusion.schedules.rectified_flow import RectifiedFlow
from multistage_diffusion.schedules.vp import VP
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.export_diffusers import export_diffusers
from multistage_diffusion.workflow.import_unet2d import diffusers_ddim
from multistage_diffusion.workflow.push import push

diffusers = pytest.importorskip("diffusers")

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

STEPS = Discrete(steps=100, spacing="linear")
EDM_DDIM = {"sampling__solver": "ddim", "sampling__spacing": "edm", "sampling__calls": 8}
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


def in_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(folder / "modules"))
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.75])
def test_a_run_on_latents_brings_its_autoencoder_scale_and_shift(
    shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multistage_diffusion.latent.codecs import open_codec
    from multistage_diffusion.workflow.latent import decoder

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        shift_factor=0.3,  # the run's counts, here another and none
    )
    vae.save_pretrained(tmp_path / "codec")
    codec: dict[str, Any] = {"codec__source": str(tmp_path / "codec"), "codec__shape": (3, 4, 4), "codec__scale": 0.4}
    codec["codec__shift"] = shift
    run = a_run(tmp_path / "run", **codec, network__channels=3, data__shape=(1, 8, 8))
    folder, x, _ = exported(run)
    pipe = in_process(folder, monkeypatch)
    assert (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor or 0.0) == (0.4, shift)
    ours = decoder(open_codec(run.config().codec), 0.4)(our_samples(run, x, None))
    theirs = pipe(latents=x, output_type="pt").images
    assert theirs.shape == (3, 1, 8, 8)
    assert (theirs - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-6


def test_an_autoencoder_of_the_hub_is_copied_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    vae = repository / "snapshots" / ("0" * 40) / "vae"
    sizes = {"in_channels": 1, "out_channels": 1, "block_out_channels": (8,), "norm_num_groups": 4}
    diffusers.AutoencoderKL(**sizes, latent_channels=3).save_pretrained(vae)
    codec: dict[str, Any] = {"codec__source": "hf:someone/something", "codec__subfolder": "vae", "codec__scale": 0.4}
    codec |= {"codec__shape": (3, 4, 4), "codec__fingerprint": codec_fingerprint(vae)}
    run = a_run(tmp_path / "run", **EDM_DDIM, **codec, network__channels=3, data__shape=(1, 4, 4))
    folder = export_diffusers(run, tmp_path / "out")
    weights = "diffusion_pytorch_model.safetensors"
    assert (folder / "vae" / weights).read_bytes() == (vae / weights).read_bytes()
    assert not (folder / "vae" / weights).is_symlink()
    assert json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"] == 0.4
    assert json.loads((folder / "model_index.json").read_text())["vae"] == ["diffusers", "AutoencoderKL"]
    push(run, "me/x", count=1, dry_run=tmp_path / "pushed")
    assert (tmp_path / "pushed" / "vae" / weights).read_bytes() == (vae / weights).read_bytes()
    diffusers.AutoencoderKL(**sizes, latent_channels=3).save_pretrained(vae)  # a later version
    with pytest.raises(UserError, match=r"codec\.fingerprint=.* is recorded"):
        export_diffusers(run, tmp_path / "other")


@pytest.mark.slow
def test_stochastic_solvers_callbacks_compiling_offloading_and_half_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = a_run(tmp_path / "run", sampling__solver="heun", sampling__calls=9, sampling__churn=2.0)
    folder, x, _ = exported(run)
    pipe = in_process(folder, monkeypatch)

    def drawn(seed: int, **options: Any) -> Tensor:
        images: Tensor = pipe(
            latents=x, generator=torch.Generator().manual_seed(seed), output_type="latent", **options
        ).images
        return images

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    doubled = drawn(1, callback_on_step_end=lambda pipe, i, t, kept: {"latents": kept["latents"] * 1.0})
    assert not torch.equal(doubled, drawn(1))  # a new state begins the solver's step anew, with new noise
    full = drawn(1)
    whole, pipe.unet = pipe.unet, torch.compile(pipe.unet, backend="eager")
    assert torch.equal(drawn(1), full)
    pipe.unet = whole
    pipe.to(torch.float16)
    half = drawn(1)
    assert half.dtype == torch.float32
    assert 0 < (half - full).abs().max() < 0.2 * full.abs().max()
    pipe = in_process(folder, monkeypatch)
    pipe.unet.keep_one_stage("cpu")
    assert torch.equal(drawn(1), full)


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
