"""Pipelines of diffusers become runs: the same samples, and back again bit for bit."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_pipelines import pipeline, trained, unet, with_part
from safetensors.torch import load_file
from torch import Tensor

from multistage_diffusion import cli
from multistage_diffusion.config.run import RunConfig
from multistage_diffusion.config.serialization import override
from multistage_diffusion.denoisers import MultiStageDenoiser
from multistage_diffusion.errors import UserError
from multistage_diffusion.interop.diffusers_folder import CONFIG, WEIGHTS
from multistage_diffusion.interop.noise_config import read_noise
from multistage_diffusion.latent.codecs import open_codec
from multistage_diffusion.samplers import make_plan, sample
from multistage_diffusion.schedules.discrete import Discrete
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.export_diffusers import export_diffusers
from multistage_diffusion.workflow.export_unet2d import _files, codec_folder, export_unet2d
from multistage_diffusion.workflow.import_run import import_published
from multistage_diffusion.workflow.import_unet2d import _sampling
from multistage_diffusion.workflow.latent import decoder
from multistage_diffusion.workflow.sample import sample as sample_run

diffusers = pytest.importorskip("diffusers")

SCHEDULERS: dict[str, dict[str, Any]] = {
    "ddpm": {},
    "unclipped": {"clip_sample": False},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.0015, "beta_end": 0.0195},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "trained": {"trained_betas": [1e-4 + i * 2e-5 for i in range(1000)]},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample", "clip_sample_range": 0.5},
    "to step 0": {"set_alpha_to_one": False},  # its last call is at step 0, too, and only clips
    "to step 0, from 1": {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False},
    "offset": {"steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "trailing, to step 0": {
        "timestep_spacing": "trailing",
        "set_alpha_to_one": False,
        "prediction_type": "v_prediction",
    },
}


class Exact(torch.nn.Module):
    """A UNet2DModel in float64 whose sinusoids are float64, too; diffusers' are always float32."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.double()
        self.model.time_proj.forward = self._sinusoids

    def _sinusoids(self, steps: Tensor) -> Tensor:
        half, shift = self.model.time_proj.num_channels // 2, self.model.config.freq_shift
        angle = steps[:, None] * torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / (half - shift))
        parts = [angle.sin(), angle.cos()]
        return torch.cat(parts[::-1] if self.model.config.flip_sin_to_cos else parts, dim=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        out: Tensor = self.model(x, step.double()).sample
        return out


def their_samples(model: Any, scheduler: Any, x: Tensor, steps: int) -> Tensor:
    """diffusers' sampling loop."""
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for step in scheduler.timesteps:
            out = model(x, step)
            x = scheduler.step(out if isinstance(out, Tensor) else out.sample, step, x).prev_sample
    return x


def our_samples(config: RunConfig, denoiser: MultiStageDenoiser, x: Tensor, steps: int) -> Tensor:
    plan = make_plan(dataclasses.replace(config.sampling, calls=steps), config.diffusion.schedule)
    # diffusers' state is ours, divided by sqrt(1 + sigma²), and is the result
    return sample(denoiser, x * plan.initial_noise_std, plan) / math.hypot(1.0, plan.steps[-1].end)


STEPS: list[dict[str, Any]] = [
    {},
    {"steps_offset": 19},
    {"steps_offset": 20},
    {"steps_offset": 499},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "trailing", "steps_offset": 7},
    {"timestep_spacing": "trailing", "num_train_timesteps": 106},
    {"timestep_spacing": "trailing", "num_train_timesteps": 53},
    {"num_train_timesteps": 2},
    {"num_train_timesteps": 51, "set_alpha_to_one": False},
]


@pytest.mark.parametrize("settings", STEPS, ids=str)
def test_calls_are_at_the_steps_of_diffusers(settings: dict[str, Any]) -> None:
    scheduler = diffusers.DDIMScheduler(**settings)
    noise = read_noise(json.loads(scheduler.to_json_string()))
    sampling, schedule = _sampling(noise, None), noise.diffusion.schedule
    plan = make_plan(sampling, schedule)
    scheduler.set_timesteps(sampling.calls)
    assert [float(schedule.time(sigma)) for sigma in plan.calls] == pytest.approx(
        scheduler.timesteps.tolist(), abs=1e-6
    )
    assert sampling.calls <= 50 or scheduler.config.num_train_timesteps % sampling.calls == 0


def test_steps_that_no_number_of_calls_has_are_refused_at_once() -> None:
    file = {"_class_name": "DDIMScheduler", "beta_start": 1e-6, "beta_end": 1e-6, "num_train_timesteps": 999_983}
    assert _sampling(read_noise({**file, "steps_offset": 499_990}), None).calls == 2  # in milliseconds
    with pytest.raises(UserError, match="num_train_timesteps=999983: no number of DDIM's calls, up to 100000, fits"):
        _sampling(read_noise({**file, "timestep_spacing": "trailing"}), None)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in ("ddpm", "v", "to step 0") else [pytest.mark.slow]) for n in SCHEDULERS]
)
def test_twenty_ddim_steps_are_those_of_diffusers(name: str, tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(**SCHEDULERS[name])
    model = unet()
    run = import_published(pipeline(tmp_path / "theirs", model, scheduler), tmp_path / "run")
    config, denoiser = run.config(), run.denoiser()
    assert config.sampling.clip == (scheduler.config.clip_sample_range if scheduler.config.clip_sample else None)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # float32: the output of an untrained network may drive the state far out, so errors count relative to it
    theirs = their_samples(model, scheduler, x.float(), 20)
    ours = our_samples(config, denoiser, x.float(), 20)
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().mean() < 1e-4 * max(1.0, float(theirs.abs().max()))
    # float64, with the same table of alpha_bar: the two computations are one
    assert isinstance(config.diffusion.schedule, Discrete)
    scheduler.alphas_cumprod = 1 / (1 + config.diffusion.schedule.sigmas**2)
    if not scheduler.config.set_alpha_to_one:
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    exact = their_samples(Exact(model), scheduler, x, 20)
    again = our_samples(config, denoiser.double(), x, 20)
    assert (again - exact).abs().max() < 1e-7 * max(1.0, float(exact.abs().max()))


def test_a_run_of_a_trained_model_samples_its_images_in_float32(tmp_path: Path) -> None:
    model, scheduler = trained(unet(), 30)
    run = import_published(pipeline(tmp_path / "theirs", model, scheduler), tmp_path / "run")
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    theirs = their_samples(model, scheduler, x, 20)
    assert theirs.std() > 0.1
    assert (our_samples(run.config(), run.denoiser(), x, 20) - theirs).abs().max() < 1e-5


@pytest.mark.parametrize("offset", [0, 1])
def test_a_model_comes_back_bit_for_bit_and_so_do_its_samples(offset: int, tmp_path: Path) -> None:
    scheduler = diffusers.DDIMScheduler(
        prediction_type="v_prediction", beta_schedule="scaled_linear", steps_offset=offset
    )
    folder = pipeline(tmp_path / "theirs", unet(num_class_embeds=None), scheduler)
    import_published(folder, tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--format", "unet2d", "--out", str(tmp_path / "back")]) == 0
    file = "unet/diffusion_pytorch_model.safetensors"
    before, after = load_file(folder / file), load_file(tmp_path / "back" / file)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = diffusers.DDIMPipeline.from_pretrained(tmp_path / "back")
    assert found.scheduler.config.steps_offset == offset
    original = diffusers.DDIMPipeline.from_pretrained(folder)
    images = [
        p(2, generator=torch.Generator().manual_seed(3), num_inference_steps=5, output_type="np").images
        for p in (found, original)
    ]
    assert (images[0] == images[1]).all()
    with pytest.raises(UserError, match="exists"):
        export_unet2d(tmp_path / "run", tmp_path / "back")


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[] if n in ("v", "to step 0", "trailing") else [pytest.mark.slow]) for n in SCHEDULERS],
)
def test_a_scheduler_comes_back_in_all_that_diffusers_reads_of_it(name: str, tmp_path: Path) -> None:
    before = diffusers.DDIMScheduler(**SCHEDULERS[name])
    run = import_published(pipeline(tmp_path / "theirs", unet(), before), tmp_path / "run")
    after = diffusers.DDIMPipeline.from_pretrained(export_unet2d(run, tmp_path / "back")).scheduler
    unread = {"steps_offset"} if before.config.timestep_spacing == "trailing" else set()
    if before.config.trained_betas is not None or before.config.beta_schedule == "squaredcos_cap_v2":
        unread |= {"beta_start", "beta_end", "beta_schedule"}
    unread |= set() if before.config.clip_sample else {"clip_sample_range"}
    names = [key for key in before.config if not key.startswith("_") and key not in unread]
    assert len(names) >= 11
    assert {key: after.config[key] for key in names} == {key: before.config[key] for key in names}
    assert torch.equal(after.alphas_cumprod, before.alphas_cumprod)
    assert torch.equal(after.final_alpha_cumprod, before.final_alpha_cumprod)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(*(their_samples(unet(), scheduler, x, 20) for scheduler in (after, before)))


def test_other_schedulers_end_where_the_ddim_of_their_configuration_does(tmp_path: Path) -> None:
    """Stable Diffusion's PNDMScheduler: steps_offset 1, no set_alpha_to_one."""
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    file = folder / "scheduler" / "scheduler_config.json"
    with_part(folder, "scheduler", diffusers.PNDMScheduler(steps_offset=1, set_alpha_to_one=False))
    run = import_published(folder, tmp_path / "run")
    found = json.loads((export_unet2d(run, tmp_path / "back") / "scheduler" / "scheduler_config.json").read_text())
    assert (found["steps_offset"], found["set_alpha_to_one"]) == (1, False)
    file.write_text(json.dumps(json.loads(file.read_text()) | {"set_alpha_to_one": 1}))
    with pytest.raises(UserError, match="set_alpha_to_one=1 must be true or false"):
        import_published(folder, tmp_path / "other")


def test_averaged_weights_of_a_checkpoint_are_the_runs_average(tmp_path: Path) -> None:
    place = tmp_path / "checkpoint-7"
    unet().save_pretrained(place / "unet")
    average = diffusers.training_utils.EMAModel(
        unet().parameters(), model_cls=diffusers.UNet2DModel, model_config=unet().config
    )
    for shadow in average.shadow_params:
        shadow += 1.0
    average.save_pretrained(place / "unet_ema")
    diffusers.DDPMScheduler().save_pretrained(tmp_path / "scheduler")
    run = import_published(place, tmp_path / "run")
    model, ema = (run.denoiser("latest", kind).state_dict() for kind in ("model", "ema"))
    assert all(torch.equal(ema[name], model[name] + 1.0) for name in model)


def test_classes_are_embedded_as_before(tmp_path: Path) -> None:
    from multistage_diffusion.contracts import Conditioning

    model = unet(num_class_embeds=4)
    run = import_published(pipeline(tmp_path / "theirs", model, diffusers.DDPMScheduler()), tmp_path / "run")
    x, labels = torch.randn(3, 3, 8, 8), torch.tensor([0, 3, 1])
    sigma = float(run.config().diffusion.schedule.sigma(400.0))
    scale = 1 / math.hypot(1, sigma)
    with torch.no_grad():
        ours = run.denoiser()(x, sigma, Conditioning(labels=labels))
        theirs = x - sigma * model(x * scale, 400, class_labels=labels).sample
    assert (ours - theirs).abs().max() < 1e-5
    assert len(sample_run(run, 2, label=3)) == 2


def test_a_pipeline_on_latents_keeps_its_autoencoder_and_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=3,
        scaling_factor=0.7,
    )
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler(clip_sample=False))
    with_part(folder, "vae", vae)
    run = import_published(folder, tmp_path / "run")
    config = run.config()
    assert (config.codec.scale, config.codec.shape, config.data.shape) == (0.7, (3, 8, 8), (3, 16, 16))
    assert sample_run(run, 2).shape == (2, 3, 16, 16)
    export_unet2d(run, tmp_path / "back")
    assert (tmp_path / "back" / "vqvae" / "config.json").read_text().count('"scaling_factor": 0.7') == 1
    hub = tmp_path / "models--me--vae"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("0" * 40)
    (hub / "snapshots").mkdir()
    (hub / "snapshots" / ("0" * 40)).symlink_to(folder / "vae")
    cached = dataclasses.replace(config, codec=dataclasses.replace(config.codec, source="hf:me/vae"))
    assert _files(cached)["model_index.json"]["vqvae"] == ["diffusers", "AutoencoderKL"]
    assert codec_folder(cached) == hub / "snapshots" / ("0" * 40)
    with pytest.raises(UserError, match=r"codec.shift=0\.1: diffusers' LDMPipeline has no shift"):
        _files(dataclasses.replace(config, codec=dataclasses.replace(config.codec, shift=0.1)))
    vae.register_to_config(shift_factor=0.1)
    vae.save_pretrained(folder / "vae")
    shifted = import_published(folder, tmp_path / "shifted")
    codec, latents = shifted.config().codec, torch.randn(1, 3, 8, 8)
    assert (codec.scale, codec.shift) == (0.7, 0.1)
    ours = decoder(open_codec(codec), 0.7)(latents)
    assert torch.allclose(ours, vae.decode(latents / 0.7 + 0.1).sample, atol=1e-6)  # as diffusers' pipelines do
    index = export_diffusers(shifted, tmp_path / "pipeline") / "vae" / CONFIG
    assert json.loads(index.read_text())["shift_factor"] == 0.1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "but model_index.json says vqvae is 'VQModel'"),
        ({"_class_name": None}, "a codec is one of AutoencoderKL or VQModel"),
        ({"in_channels": 0}, "is not that of an autoencoder"),
        ({"in_channels": 10**9}, "more than any autoencoder"),
        ({"block_out_channels": []}, "is not that of an autoencoder"),
        ({"shift_factor": "a"}, "shift_factor='a' must be a number"),
        ({"shift_factor": 0.1}, "is read of an AutoencoderKL only"),
        ({"latent_channels": 7}, "its latents have 7 channels, but the network has 3"),
        (None, "truncated or damaged"),
    ],
    ids=str,
)
def test_an_autoencoder_that_cannot_be_one_is_refused(
    change: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    sizes = {"latent_channels": 3, "block_out_channels": (8,), "norm_num_groups": 4}
    with_part(folder, "vqvae", diffusers.VQModel(**sizes))
    config, weights = (folder / "vqvae" / name for name in (CONFIG, WEIGHTS))
    if change is None:
        weights.write_bytes(weights.read_bytes()[:500])
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError) as error:
        import_published(folder, tmp_path / "run")
    assert message in str(error.value)
    assert not (tmp_path / "run").exists()


def test_fewer_calls_are_made_where_an_offset_leaves_no_room(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    diffusers.DDIMScheduler(steps_offset=30).save_pretrained(folder / "scheduler")
    config = import_published(folder, tmp_path / "run").config()
    schedule, sampling = config.diffusion.schedule, config.sampling
    assert isinstance(schedule, Discrete)
    assert sampling.calls == 32  # 31 apart: with 33 calls, 30 apart, diffusers' last step would not end at the image
    calls = make_plan(sampling, schedule).calls
    assert (calls[0], calls[-1]) == pytest.approx((float(schedule.sigma(30 + 31 * 31)), float(schedule.sigma(30))))


def test_trailing_steps_have_a_number_of_calls_that_divides_them(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    diffusers.DDIMScheduler(timestep_spacing="trailing", num_train_timesteps=97).save_pretrained(folder / "scheduler")
    assert import_published(folder, tmp_path / "run").config().sampling.calls == 97


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = unet()
    with torch.no_grad():
        model.conv_in.weight[0] = math.inf
    folder = pipeline(tmp_path / "theirs", model, diffusers.DDPMScheduler())
    with pytest.raises(UserError, match=r"weights of conv_in\.weight are not finite"):
        import_published(folder, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_told(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    plain = import_published(folder, tmp_path / "plain").config()
    with pytest.warns(UserWarning, match=r"sampling\.threshold=0\.9 is left out"):
        _files(override(plain, {"sampling.clip": None, "sampling.threshold": 0.9}))
    with_part(folder, "vqvae", diffusers.VQModel(latent_channels=3, block_out_channels=(8,), norm_num_groups=4))
    with pytest.warns(UserWarning, match="clip_sample .* is left out: latents are not clipped"):
        import_published(folder, tmp_path / "latent")


def test_what_does_not_fit_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "theirs", unet(sample_size=None), diffusers.DDPMScheduler())
    with pytest.raises(UserError, match=r"sample_size is null .*--size H W"):
        import_published(folder, tmp_path / "run")
    with pytest.raises(UserError, match=r"head_channels=\d+: has no meaning for a folder"):
        import_published(folder, tmp_path / "run", head_channels=8)
    run = import_published(folder, tmp_path / "run", size=(8, 8))
    assert run.config().data.shape == (3, 8, 8)
    diffusers.DDIMScheduler(rescale_betas_zero_snr=True).save_pretrained(folder / "scheduler")
    with pytest.raises(UserError, match="rescale_betas_zero_snr=True"):
        import_published(folder, tmp_path / "other", size=(8, 8))
    assert not (tmp_path / "other").exists()


def test_an_imported_run_is_not_exported_as_latent_diffusions(tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "theirs", unet(), diffusers.DDPMScheduler())
    run = import_published(folder, tmp_path / "run")
    assert isinstance(run, Run)
    assert cli.main(["export", str(run.path), "--out", str(tmp_path / "x.ckpt")]) == 2
