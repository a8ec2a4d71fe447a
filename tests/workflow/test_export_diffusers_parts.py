"""Exported pipelines on latents, and what diffusers and torch do with pipelines: offloading, half precision, compiling."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_pipelines import EDM_DDIM, a_run, elsewhere, exported, in_process, our_samples
from torch import Tensor

from multistage_diffusion.errors import UserError
from multistage_diffusion.latent.codecs import codec_fingerprint, open_codec
from multistage_diffusion.samplers import make_plan
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.export_diffusers import export_diffusers
from multistage_diffusion.workflow.latent import decoder, recorded_scale
from multistage_diffusion.workflow.push import push
from multistage_diffusion.workflow.sample import sample

diffusers = pytest.importorskip("diffusers")


def test_arguments_that_mean_nothing_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, x, labels = exported(a_run(tmp_path / "run", network__num_classes=3))
    pipe = in_process(folder, monkeypatch)
    assert labels is not None
    given = {"latents": x, "class_labels": labels}
    for change, message in (
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be positive"),
        ({"output_type": "bogus"}, "output_type='bogus' must be one of pil, np, pt, latent"),
        ({"class_labels": 1.5}, "class_labels=1.5 must be whole numbers"),
        ({"class_labels": [0, 1]}, "class_labels: 2 for 3 images"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{**given, **change})
    with pytest.raises(ValueError, match="class_labels: 2 for 5 images"):
        pipe(class_labels=[0, 1], batch_size=5)
    assert len(pipe(class_labels=[0, 1], output_type="pt").images) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shift", [0.0, 0.75])
def test_a_run_on_latents_brings_its_autoencoder_scale_and_shift(
    shift: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def latent_run(folder: Path, kind: str) -> Run:
    """A run on the latents of a random autoencoder: shifted ones (KL, our sampler), or quantised ones (VQ, diffusers')."""
    torch.manual_seed(0)
    levels: dict[str, Any] = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "norm_num_groups": 4,
        "latent_channels": 3,
    }
    if kind == "kl":
        diffusers.AutoencoderKL(**levels).save_pretrained(folder / "codec")
    else:
        diffusers.VQModel(**levels, num_vq_embeddings=16).save_pretrained(folder / "codec")
    codec = {"source": str(folder / "codec"), "shape": (3, 4, 4), "scale": 0.4, "shift": 0.75 if kind == "kl" else 0.0}
    changes: dict[str, Any] = {f"codec__{name}": value for name, value in codec.items()}
    sampling = {"sampling__calls": 9} if kind == "kl" else EDM_DDIM
    return a_run(folder / "run", **changes, **sampling, network__channels=3, data__shape=(3, 8, 8))


@pytest.mark.slow
def test_runs_on_latents_draw_msdiffs_images_without_this_package(tmp_path: Path) -> None:
    runs = {kind: latent_run(tmp_path / kind, kind) for kind in ("kl", "vq")}
    made = {kind: exported(run) for kind, run in runs.items()}
    found = elsewhere([folder for folder, _, _ in made.values()], tmp_path)
    for (kind, run), ((end, images, levels), scheduler, _, few) in zip(runs.items(), found, strict=True):
        assert scheduler == {"kl": "MultistageScheduler", "vq": "EDMEulerScheduler"}[kind]
        config, latents = run.config(), our_samples(run, made[kind][1], None)
        assert (end - latents).abs().max() < 1e-5 * max(1.0, float(latents.abs().max()))
        ours = decoder(open_codec(config.codec), recorded_scale(config.codec))(latents)
        assert (images.shape, few) == ((3, 3, 8, 8), 2)
        assert ours.std() > 0.05
        assert (images - (ours / 2 + 0.5).clamp(0, 1)).abs().max() < 1e-5
        own = sample(run, 3)  # as msdiff sample draws and decodes them
        theirs = torch.tensor(levels).unflatten(1, (8, 8)).movedim(-1, 1)
        assert own.float().std() > 5
        assert (theirs - own.int()).abs().max() <= 1
        assert (theirs != own).float().mean() <= 0.01


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
    decoders = pipe.unet.network.decoders
    home = [[parameter.data_ptr() for parameter in decoder.parameters()] for decoder in decoders]
    pipe.unet.keep_one_stage("cpu")
    resident = []  # after each call, the decoders that are copies on the device

    def note(pipe: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        now = [[parameter.data_ptr() for parameter in decoder.parameters()] for decoder in decoders]
        resident.append([k for k, (a, b) in enumerate(zip(now, home, strict=True)) if a != b])
        return {}

    assert torch.equal(drawn(1, callback_on_step_end=note), full)
    config = run.config()
    calls = make_plan(config.sampling, config.diffusion.schedule).calls
    assert resident == [[k] for k in config.stages.index(torch.tensor(calls, dtype=torch.float64)).tolist()]
    assert len({stages[0] for stages in resident}) == 3


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_the_network_of_a_pipeline_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's default backend, inductor, in two stages."""
    changes = {"network__decoder_widths": (8, 4), "stages__interior": (0.5,), "sampling__calls": 4}
    folder, x, _ = exported(a_run(tmp_path / "run", **EDM_DDIM | changes))
    pipe = in_process(folder, monkeypatch)
    expected = pipe(latents=x, output_type="latent").images
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    pipe.unet = torch.compile(pipe.unet)
    found = pipe(latents=x, output_type="latent").images
    assert counters["inductor"]["fxgraph_cache_miss"] > 0
    assert expected.std() > 0.05
    assert (found - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
