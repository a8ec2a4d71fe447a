"""The variational bound of a run's held-out images, from Python and from the command line."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from multistage_diffusion.cli import main
from multistage_diffusion.config import CodecConfig
from multistage_diffusion.config.serialization import override
from multistage_diffusion.data import to_float
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.errors import UserError
from multistage_diffusion.evaluation.likelihood import likelihood
from multistage_diffusion.latent.latents import LatentData
from multistage_diffusion.schedules import LogNormal, UniformTime
from multistage_diffusion.schedules.discrete import Discrete, UniformSteps
from multistage_diffusion.workflow import likelihood as likelihood_module
from multistage_diffusion.workflow.likelihood import measure_likelihood, noise_range
from multistage_diffusion.workflow.train import train


@pytest.fixture(scope="module", name="run")
def fixture_run(tmp_path_factory, tiny_config, tiny_data):
    folder = tmp_path_factory.mktemp("likelihood")
    np.save(folder / "images.npy", tiny_data(40).array()[:, 0])
    config = tiny_config(data__source=str(folder / "images.npy"), data__held_out=0.5, training__steps=2)
    return train(config, folder / "run", device="cpu")


def test_it_is_the_bound_of_the_held_out_images(run):
    found = measure_likelihood(run, draws=2, seed=5)
    config = run.config()
    _, held_out = open_data(config.data.source).split(config.data.held_out)
    low, high = noise_range(config)
    exact = likelihood(run.denoiser(), to_float(held_out.array()), config.stages, low, high, draws=2, seed=5).result()
    assert found == exact
    assert found.unit == "bits/dim"
    assert found.rows == len(held_out)
    kept = json.loads((run.path / "likelihood.json").read_text())[-1]  # other tests may have added theirs
    assert kept["step"] == 2
    assert kept["total"]["mean"] == found.total.mean


def test_the_command_shows_every_term(run, capsys):
    assert main(["evaluate", str(run.path), "--likelihood", "--count", "5", "--sigma-range", "0.05", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("variational bound of 5 held-out images in bits/dim")
    names = ["stage 1  sigma 0.05 to 0.2", "stage 2  sigma 0.2 to 0.6", "stage 3  sigma 0.6 to 2"]
    for line, name in zip(lines[1:], [*names, "all stages", "prior", "reconstruction", "total"], strict=True):
        assert line.startswith(f"{name} ")
    means = [float(line[34:].split("±")[0]) for line in lines[1:]]
    assert sum(means[:3]) == pytest.approx(means[3], abs=2e-4)
    assert sum(means[3:6]) == pytest.approx(means[6], abs=2e-4)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"sigma_max": 1e6}, "exceeds the training noise"),
        ({"sigma_min": 1e-9}, "exceeds the training noise"),
        ({"sigma_min": 2.0, "sigma_max": 1.0}, "must be 0 < min < max"),
        ({"count": 1}, "at least 2 images"),
        ({"draws": 0}, "draws=0"),
    ],
)
def test_what_cannot_be_measured_is_refused(run, given, words):
    before = (run.path / "likelihood.json").read_bytes() if (run.path / "likelihood.json").exists() else b""
    with pytest.raises(UserError, match=words):
        measure_likelihood(run, **given)
    assert ((run.path / "likelihood.json").read_bytes() if before else b"") == before


@pytest.mark.parametrize("arguments", [["--sigma-range", "0.1", "1"], ["--likelihood", "--against", "train"]])
def test_options_that_do_not_fit_are_refused(run, arguments, capsys):
    assert main(["evaluate", str(run.path), *arguments]) == 2
    assert "--likelihood" in capsys.readouterr().err


def test_the_default_range_is_that_of_the_training_noise(tiny_config):
    config = tiny_config()
    low, high = noise_range(config)
    assert isinstance(config.diffusion.prior, LogNormal)
    for end, tail in ((low, 1e-3), (high, 1 - 1e-3)):
        assert config.diffusion.prior.mass(0, end) == pytest.approx(tail, abs=1e-6)
    for prior in (UniformTime(), UniformSteps(schedule=Discrete())):
        other = dataclasses.replace(config.diffusion, prior=prior)
        low, high = noise_range(dataclasses.replace(config, diffusion=other))
        assert 0 < low < high < float("inf")


def test_latents_have_nats_and_no_reconstruction(run, monkeypatch):
    """Of a run on latents the network sees latents: here the images themselves, times a scale."""
    config = run.config()
    latent = dataclasses.replace(config, codec=CodecConfig(source="codec", shape=config.data.shape, scale=0.5))
    latents = torch.randn(20, *config.data.shape, generator=torch.Generator().manual_seed(0))
    seen = []

    def cached(codec, images, *, scale, device):
        seen.append((codec, len(images), scale))
        return LatentData(latents[: len(images)], None, None, "latents"), scale

    module = "multistage_diffusion.workflow.likelihood"
    monkeypatch.setattr(f"{module}.cached_latents", cached)
    monkeypatch.setattr(f"{module}.open_codec", lambda config, device: "the codec")
    monkeypatch.setattr(type(run), "config", lambda self: latent)
    monkeypatch.setattr(type(run), "denoiser", lambda self, *_, **__: lambda x, sigma, cond=None: torch.zeros_like(x))
    found = measure_likelihood(run, count=6, draws=1)
    assert found.unit == "nats/dim"
    assert found.reconstruction is None
    assert seen == [("the codec", 6, 0.5)]
    low, high = noise_range(config)
    mean = float(latents[:6].square().mean())
    assert found.prior.mean == pytest.approx(mean / (2 * high**2), rel=1e-5)
    assert found.diffusion.mean == pytest.approx(mean * (low**-2 - high**-2) / 2, rel=0.5)  # zeros: MSE is E y²


def test_what_another_process_has_written_meanwhile_stays(run, monkeypatch):
    file, real = run.path / "likelihood.json", likelihood_module.likelihood

    def meanwhile(*args, **kwargs):
        kept = json.loads(file.read_text()) if file.exists() else []
        file.write_text(json.dumps([*kept, {"step": 99}]))
        return real(*args, **kwargs)

    monkeypatch.setattr(likelihood_module, "likelihood", meanwhile)
    measure_likelihood(run, count=5, draws=1)
    assert [entry["step"] for entry in json.loads(file.read_text())][-2:] == [99, 2]


def test_an_average_of_another_width_has_its_own_bound(run, tmp_path):
    settings = {"training.ema_profiles": [0.05, 0.1], "training.steps": 3, "optimizer.lr": 0.02}
    made = train(override(run.config(), settings), tmp_path / "run", device="cpu")
    found = {ema: measure_likelihood(made, count=5, ema=ema) for ema in (None, 0.1, 0.07)}
    means = [result.total.mean for result in found.values()]
    assert len(set(means)) == 3
    inputs = to_float(made.data().split(0.5)[1].array()[:5])
    exact = likelihood(made.denoiser(weights=0.07), inputs, made.config().stages, *noise_range(made.config())).result()
    assert found[0.07] == exact
    assert [entry.get("ema") for entry in json.loads((made.path / "likelihood.json").read_text())] == [None, 0.1, 0.07]
