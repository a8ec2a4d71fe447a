"""Runs on latents: encoded once, resumed to the bit, decoded at every use, and never on another codec than their own."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from multistage_diffusion.config import CodecConfig, DiffusionConfig, RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override, to_dict
from multistage_diffusion.data import ImageData, to_uint8
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation import frechet_distance, get_features
from multistage_diffusion.files import write_json
from multistage_diffusion.latent.codecs import open_codec
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.training.checkpoint import load_tensors
from multistage_diffusion.training.flops import flops_per_image
from multistage_diffusion.training.run import Run
from multistage_diffusion.workflow.auto import auto_config
from multistage_diffusion.workflow.evaluate import evaluate
from multistage_diffusion.workflow.latent import decoder, reconstruct
from multistage_diffusion.workflow.likelihood import measure_likelihood
from multistage_diffusion.workflow.report import report
from multistage_diffusion.workflow.resume import resume
from multistage_diffusion.workflow.sample import sample
from multistage_diffusion.workflow.stages import find_stages
from multistage_diffusion.workflow.train import train

diffusers = pytest.importorskip("diffusers")

TINY = {
    "network.decoder_widths": [64, 64, 64],
    "network.channel_mult": [1],
    "network.blocks_per_level": 1,
    "network.attention_factors": [1],
    "training.batch": 6,
    "training.steps": 4,
    "training.log_every": 2,
    "training.checkpoint_every": 2,
    "training.held_out_every": 2,
    "training.held_out_rows": 4,
    "training.sample_every": 4,
    "training.sample_count": 4,
    "sampling.calls": 4,
    "data.size": None,
    "data.fit": "exact",
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MSDIFF_CACHE", str(tmp_path / "cache"))


def save_codec(folder: Path, seed: int = 0) -> Path:
    """Write a random KL codec of grey images with 4 latent channels, each half as high and wide."""
    torch.manual_seed(seed)
    model = diffusers.AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def codec(tmp_path: Path) -> Path:
    return save_codec(tmp_path / "codec")


@pytest.fixture
def config(tmp_path: Path, codec: Path) -> RunConfig:
    """The latent preset made tiny, on noise images of 8x6 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (80, 8, 6), dtype=np.uint8)
    np.save(tmp_path / "noise.npy", pixels)
    changes = {**TINY, "data.source": str(tmp_path / "noise.npy"), "data.shape": [], "codec.source": str(codec)}
    return override(preset("fashion-mnist-latent"), changes)


def test_a_run_is_evaluated_on_decoded_samples(config: RunConfig, tmp_path: Path) -> None:
    run = train(override(config, {"evaluation.every": 4, "evaluation.count": 12}), tmp_path / "run")
    (record,) = (r for r in run.records() if r["kind"] == "quality")
    pixels = get_features("pixels")
    training, _ = run.data().split(config.data.held_out)
    samples = sample(run, 12, checkpoint="latest")
    assert samples.shape[1:] == (1, 8, 6)
    expected = frechet_distance(pixels(samples), pixels(training.tensor()))
    assert record["frechet"] == pytest.approx(expected, rel=1e-6)
    assert record["petaflops"] == pytest.approx(flops_per_image(run.config()) * 24 / 1e15)


def test_a_run_records_what_its_latents_are(config: RunConfig, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run")
    trained = run.config()
    assert trained.data.shape == (1, 8, 6)
    assert trained.codec.shape == trained.input_shape == (4, 4, 3)
    assert trained.network.channels == 4
    assert trained.codec.fingerprint
    assert trained.codec.scale is not None
    latents = [encoded(config, tmp_path, part) for part in run.data().split(0.1)]
    assert trained.codec.scale == pytest.approx(1 / float(latents[0].double().std(correction=0)), rel=1e-3)
    assert (run.path / "samples" / "step_00000004.png").exists()


def test_a_run_takes_the_scale_that_its_codec_declares(config: RunConfig, tmp_path: Path) -> None:
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "codec")
    model.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    model.save_pretrained(tmp_path / "codec")
    run = train(override(config, {"codec.scale": "config"}), tmp_path / "run")
    codec = run.config().codec
    assert (codec.scale, codec.shift) == (0.5, 0.25)
    images, _ = run.data().split(0.1)
    latents = open_codec(codec).encode(torch.from_numpy(images.array()).float() / 127.5 - 1)
    assert torch.allclose(latents, encoded(config, tmp_path, images) - 0.25, atol=1e-5)
    assert sample(run, 2).shape == (2, 1, 8, 6)
    resume(run.path, {"training.steps": 6})


def encoded(config: RunConfig, tmp_path: Path, part) -> torch.Tensor:
    """Encode images without our code."""
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "codec").eval()
    with torch.no_grad():
        return model.encode(torch.from_numpy(part.array()).float() / 127.5 - 1).latent_dist.mean


def test_a_resumed_run_equals_an_uninterrupted_one(config: RunConfig, tmp_path: Path) -> None:
    whole = train(config, tmp_path / "whole")
    train(override(config, {"training.steps": 2}), tmp_path / "parts")
    parts = resume(tmp_path / "parts", {"training.steps": 4})
    for name in ("model", "ema", "optimizer"):
        one, other = (load_tensors(run.checkpoint("latest"), name) for run in (whole, parts))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_sigma_data_that_does_not_suit_the_latents_is_warned_of(config: RunConfig, tmp_path: Path) -> None:
    edm = {"diffusion": DiffusionConfig(precondition="edm", sigma_data=0.3, prior=LogNormal())}
    with pytest.warns(UserWarning, match=r"sigma_data=0.3, but the latents' standard deviation is 1;"):
        train(override(config, edm), tmp_path / "run")


@pytest.mark.slow
def test_a_configuration_is_chosen_for_latents_too(config: RunConfig, codec: Path, tmp_path: Path) -> None:
    small = {key: value for key, value in TINY.items() if key.startswith(("network.d", "training."))}
    given = {**small, "codec.source": str(codec), "network.encoder_width": 16, "network.decoder_widths": [16, 16, 16]}
    chosen = auto_config(config.data.source, {**given, "evaluation.every": 0}, device="cpu")
    assert chosen.config.diffusion.sigma_data == 1.0
    run = train(chosen.config, tmp_path / "run", result=chosen.result, device="cpu")
    assert run.config().input_shape == (4, 4, 3)
    assert run.config().stages == chosen.config.stages


@pytest.mark.parametrize("scale", [None, "config"])
def test_a_run_that_records_no_scale_is_refused(config: RunConfig, tmp_path: Path, scale: str | None) -> None:
    run = train(config, tmp_path / "run")
    stored = run.config()
    write_json(
        run.config_file, to_dict(dataclasses.replace(stored, codec=dataclasses.replace(stored.codec, scale=scale)))
    )
    with pytest.raises(UserError, match=rf"codec\.scale={scale}: a run on latents records a number there"):
        sample(run, count=2)
    with pytest.raises(UserError, match=r"codec\.scale was edited"):  # the checkpoint knows better
        measure_likelihood(run, count=2)


def test_images_are_encoded_once(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(config, tmp_path / "one")
    from multistage_diffusion.latent import codecs

    def refuse(*_: object) -> torch.Tensor:
        raise AssertionError("encoded again")

    monkeypatch.setattr(codecs.DiffusersCodec, "encode", refuse)
    train(config, tmp_path / "two")


def test_flips_are_of_the_images(config: RunConfig, tmp_path: Path) -> None:
    """A run with flips sees latents of mirrored images, which are not mirrored latents."""
    seen = []

    class Watch:
        def __getattr__(self, name: str):
            def method(trainer, *_: object) -> None:
                if name == "started":
                    seen.append(trainer.passes.source)

            return method

    train(override(config, {"training.flip": True}), tmp_path / "run", callbacks=[Watch()])  # type: ignore[list-item]
    (source,) = seen
    training, _ = Run(tmp_path / "run").data().split(0.1)
    mirrored = ImageData(training.array()[..., ::-1].copy(), None, "mirrored")
    scale = Run(tmp_path / "run").config().codec.scale
    found = torch.from_numpy(source.mirrored.rows(np.arange(len(training))))
    torch.testing.assert_close(found, encoded(config, tmp_path, mirrored) * scale, rtol=1e-4, atol=1e-4)


def test_samples_are_decoded_latents(config: RunConfig, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run")
    images = sample(run, 5)
    assert images.shape == (5, 1, 8, 6)
    assert images.dtype == torch.uint8
    trained = run.config()
    from multistage_diffusion.samplers.sampling import sample_images

    ends = []
    sample_images(
        run.denoiser(),
        trained.input_shape,
        5,
        config=trained.sampling,
        schedule=trained.diffusion.schedule,
        decode=lambda z: ends.append(z) or z,
    )
    model = diffusers.AutoencoderKL.from_pretrained(tmp_path / "codec").eval()
    with torch.no_grad():
        expected = to_uint8(model.decode(ends[0] / trained.codec.scale).sample)
    assert (images.int() - expected.int()).abs().max() <= 1


@pytest.mark.slow
def test_evaluation_says_what_the_codec_alone_costs(config: RunConfig, tmp_path: Path) -> None:
    run = train(override(config, {"data.held_out": 0.3}), tmp_path / "run")
    result = evaluate(run, count=20)
    assert "frechet_reconstructed" in result.metrics
    assert "reconstructions" in report(run, count=4).read_text()


def test_large_batches_are_decoded_in_pieces(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from multistage_diffusion.latent.codecs import open_codec
    from multistage_diffusion.workflow import latent

    codec = open_codec(config.codec, "cpu")
    latents = torch.randn(7, 4, 4, 3)
    whole = decoder(codec, 2.0)(latents)
    monkeypatch.setattr(latent, "PIXELS_AT_ONCE", 2 * 8 * 6)
    torch.testing.assert_close(decoder(codec, 2.0)(latents), whole)
    torch.testing.assert_close(whole[:1], codec.decode(latents[:1] / 2.0))


def test_reconstructions_keep_their_order(config: RunConfig) -> None:
    images = torch.arange(80, dtype=torch.uint8)[:, None, None, None].expand(80, 1, 8, 6).contiguous()
    whole = reconstruct(config, images, "cpu")
    assert torch.equal(whole[70:75], reconstruct(config, images[70:75], "cpu"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codec.source": ""}, "codec.source is empty: name an autoencoder"),
        ({"codec.source": "no/such"}, "no/such"),
        ({"training.augment": 0.1}, "is of pixels, not of latents"),
    ],
)
def test_what_cannot_be_trained_is_refused(config: RunConfig, tmp_path: Path, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train(override(config, changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_split_of_pixels_is_refused(config: RunConfig, tmp_path: Path) -> None:
    result = find_stages("digits", StageSettings(samples=200))
    with pytest.raises(ValueError, match="found on pixels, but this run trains on latents"):
        train(config, tmp_path / "run", result=result)


@pytest.mark.slow
def test_a_split_of_latents_is_of_what_the_run_sees(config: RunConfig, codec: Path, tmp_path: Path) -> None:
    result = find_stages(config.data, StageSettings(algorithm=2, samples=100), codec=CodecConfig(source=str(codec)))
    run = train(config, tmp_path / "run", result=result)
    trained = run.config()
    assert trained.stages.interior == result.edges_sigma
    assert trained.codec.scale == result.scale
    assert result.codec == trained.codec.fingerprint
    training, _ = run.data().split(0.1)
    latents = encoded(config, tmp_path, training) * result.scale
    direct = compute_stages(latents, StageSettings(algorithm=2, samples=100, data_range=None))
    assert result.edges_t == direct.edges_t


@pytest.mark.slow
@pytest.mark.parametrize("with_stages", [False, True])
def test_a_network_blind_to_its_noise_is_warned_of(
    config: RunConfig, codec: Path, tmp_path: Path, with_stages: bool
) -> None:
    narrow = override(config, {"network.decoder_widths": [64, 32, 64]})
    settings = StageSettings(algorithm=2, samples=100)
    result = find_stages(config.data, settings, codec=CodecConfig(source=str(codec))) if with_stages else None
    with pytest.warns(UserWarning, match="erases what the network is told of noise and class; use at least 64"):
        train(narrow, tmp_path / "narrow", result=result)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the stages are those of CIFAR-10")
        warnings.filterwarnings("ignore", "8 images held out")
        train(config, tmp_path / "wide", result=result)


def test_a_split_of_other_latents_is_refused(config: RunConfig, codec: Path, tmp_path: Path) -> None:
    result = find_stages(config.data, StageSettings(algorithm=2, samples=100), codec=CodecConfig(source=str(codec)))
    with pytest.raises(ValueError, match="found on latents, but this run trains on pixels"):
        train(preset("digits"), tmp_path / "pixels", result=result)
    with pytest.raises(ValueError, match=r"found on latents times .* but codec.scale=3"):
        train(override(config, {"codec.scale": 3.0}), tmp_path / "scaled", result=result)
    with pytest.raises(ValueError, match="latents of another codec"):
        train(config, tmp_path / "other", result=dataclasses.replace(result, codec="other"))
    assert not any((tmp_path / name).exists() for name in ("pixels", "scaled", "other"))


def test_another_codec_is_refused(config: RunConfig, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run")
    save_codec(tmp_path / "codec", seed=1)
    with pytest.raises(ValueError, match=r"codec.fingerprint"):
        sample(run, 2)
    with pytest.raises(ValueError, match=r"codec.fingerprint"):
        resume(run.path, {"training.steps": 6})


@pytest.mark.slow
def test_a_codec_that_moved_is_found_again(config: RunConfig, tmp_path: Path) -> None:
    run = train(config, tmp_path / "run")
    (tmp_path / "codec").rename(tmp_path / "moved")
    resume(run.path, {"training.steps": 6, "codec.source": str(tmp_path / "moved")})
    assert sample(run, 2).shape == (2, 1, 8, 6)
