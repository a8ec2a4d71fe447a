"""The sampler that an imported model has where it comes from: taken, told, and written back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_pipelines import pipeline, trained, unet, with_part

from multistage_diffusion import cli
from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.noise_config import read_noise
from multistage_diffusion.samplers import make_plan, sample
from multistage_diffusion.workflow.export_unet2d import export_unet2d
from multistage_diffusion.workflow.import_run import import_published
from multistage_diffusion.workflow.import_unet2d import _own_sampling, _sampling
from multistage_diffusion.workflow.imported import OwnSampler, read_own_sampler

diffusers = pytest.importorskip("diffusers")


def saved_ddpm(folder: Path, **settings: Any) -> Path:
    """A pipeline of 40 steps with a clipped DDPMScheduler, trained a little."""
    model, _ = trained(unet(), 10)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=40, beta_end=0.3, **settings)
    diffusers.DDPMPipeline(model, scheduler).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_run_with_the_models_own_sampler_is_its_ddpm_pipeline(
    variance: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved_ddpm(tmp_path / "theirs", variance_type=variance)
    run = import_published(folder, tmp_path / "run", sampler="own")
    config, g = run.config(), torch.Generator().manual_seed(1)
    assert (config.sampling.calls, config.sampling.clip) == (40, 1.0)
    drawn = [torch.randn(2, 3, 8, 8, generator=g) for _ in range(41)]
    plan = make_plan(config.sampling, config.diffusion.schedule)
    start = (drawn[0] * plan.initial_noise_std).double()
    ours = sample(run.denoiser(), start, plan, noise=lambda step: drawn[step + 1]).clamp(-1, 1)
    rest = iter(drawn)
    for place in ("pipelines.ddpm.pipeline_ddpm", "schedulers.scheduling_ddpm"):
        monkeypatch.setattr(f"diffusers.{place}.randn_tensor", lambda *_, **__: next(rest))
    pipe = diffusers.DDPMPipeline.from_pretrained(folder)
    theirs = pipe(2, num_inference_steps=40, output_type="np").images
    assert (ours.permute(0, 2, 3, 1) / 2 + 0.5 - torch.from_numpy(theirs)).abs().max() < 1e-5
    assert theirs.std() > 0.05


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_ddpm_pipeline_comes_back(variance: str, tmp_path: Path) -> None:
    folder = saved_ddpm(tmp_path / "theirs", variance_type=variance, clip_sample_range=0.7)
    run = import_published(folder, tmp_path / "run", sampler="own")
    export_unet2d(run, tmp_path / "back")
    found, before = (diffusers.DiffusionPipeline.from_pretrained(f) for f in (tmp_path / "back", folder))
    assert type(found).__name__ == "DDPMPipeline"
    names = {name for name in before.scheduler.config if not name.startswith("_")}
    assert {n: found.scheduler.config[n] for n in names} == {n: before.scheduler.config[n] for n in names}
    images = [
        pipe(2, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
        for pipe in (found, before)
    ]
    assert (images[0] == images[1]).all()


def test_import_and_sample_tell_the_sampler_and_how_to_get_the_models_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = saved_ddpm(tmp_path / "theirs", variance_type="fixed_large"), tmp_path / "run"
    assert cli.main(["import", str(folder), "--out", str(run)]) == 0
    hint = f"the model's own sampler is DDPMScheduler: msdiff sample {run} --solver ddpm-large"
    assert capsys.readouterr().out.endswith(f"sampler: ddim, 40 calls\n{hint}\n")
    drawn = ["sample", str(run), "--count", "1", "--overwrite", "--out", str(tmp_path / "x.png")]
    assert cli.main(drawn) == 0
    assert capsys.readouterr().out.endswith(f"(1 sample, ddim, 40 calls)\n{hint}\n")
    assert cli.main([*drawn, *hint.partition(f"{run} ")[2].split()]) == 0
    said = capsys.readouterr().out
    assert said.endswith("(1 sample, ddpm-large, 40 calls)\nthat is the model's own sampler, DDPMScheduler\n")
    assert cli.main([*drawn, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 1
    own = import_published(folder, tmp_path / "own", sampler="own").config().sampling
    assert (own.solver, own.calls) == ("ddpm-large", 40)


@pytest.mark.parametrize(
    ("scheduler", "said"),
    [
        (diffusers.DDIMScheduler(), "that is the model's own sampler, DDIMScheduler"),
        (diffusers.DDPMScheduler(), "DDPMScheduler: msdiff sample RUN --solver ddpm --calls 1000"),
        (diffusers.DDPMScheduler(steps_offset=1), "DDPMScheduler: msdiff sample RUN --solver ddpm --calls 500"),
        (diffusers.DDPMScheduler(timestep_spacing="linspace"), "msdiff sample RUN --solver ddpm --calls 1000"),
        (diffusers.DDPMScheduler(timestep_spacing="linspace", num_train_timesteps=1500), "no solver here makes"),
        (diffusers.DDPMScheduler(variance_type="fixed_large", steps_offset=1), "no solver here makes"),
        (diffusers.DDPMScheduler(variance_type="fixed_large_log"), "no solver here makes"),
        (diffusers.PNDMScheduler(), "own sampler is PNDMScheduler, whose steps no solver here makes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_own_sampler_of_every_scheduler(scheduler: Any, said: str) -> None:
    noise = read_noise(json.loads(scheduler.to_json_string()))
    ddim = _sampling(noise, noise.clip)
    own = OwnSampler(scheduler=noise.scheduler, sampling=_own_sampling(noise, ddim))
    assert said in own.sentence(Path("RUN"), ddim)


def test_a_ddim_pipeline_makes_a_ddim_scheduler_of_any(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    with_part(folder, "scheduler", diffusers.DDPMScheduler(variance_type="fixed_large"))
    assert type(diffusers.DDIMPipeline.from_pretrained(folder).scheduler).__name__ == "DDIMScheduler"
    own = read_own_sampler(import_published(folder, tmp_path / "run"))
    assert own is not None
    assert (own.scheduler, own.sampling and own.sampling.solver) == ("DDIMScheduler", "ddim")


def test_an_own_sampler_that_is_not_here_is_refused(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(variance_type="fixed_large_log")).save_pretrained(folder)
    with pytest.raises(UserError, match="sampler='own': DDPMScheduler: no solver here makes its steps"):
        import_published(folder, tmp_path / "run", sampler="own")
    with pytest.raises(UserError, match="sampler='dpm' is unknown; choose ddim or own"):
        import_published(folder, tmp_path / "run", sampler="dpm")
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="sampler=own: has no meaning for what is no folder of diffusers"):
        import_published(tmp_path / "x.pth", tmp_path / "run", sampler="own")


@pytest.mark.parametrize("record", ["{", "[1]", '{"scheduler": 3}', '{"scheduler": "A", "sampling": {"solver": "?"}}'])
def test_a_record_that_cannot_be_read_only_says_less(record: str, tmp_path: Path) -> None:
    run = import_published(pipeline(tmp_path / "theirs", unet(), diffusers.DDIMScheduler()), tmp_path / "run")
    assert read_own_sampler(run) is not None
    run.imported_file.write_text(record)
    assert read_own_sampler(run) is None
