"""Stages by the Wiener denoiser from images to result, on handwritten digits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from multistage_diffusion import palette
from multistage_diffusion.config import DiffusionConfig
from multistage_diffusion.errors import UserError
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.schedules.edm import EDM
from multistage_diffusion.stage_finding import StageResult, StageSettings, compute_stages, gaussian_stages
from multistage_diffusion.stage_finding.edge_preview import decode_png
from multistage_diffusion.stage_finding.gaussian import gaussian_edges, measure_moments
from multistage_diffusion.stage_finding.plots import plot_stages

IMAGES = np.round(load_digits().images * 255 / 16).astype(np.uint8)[:, None]
SETTINGS = StageSettings(algorithm=2, denoiser="gaussian")
PRIOR = LogNormal(p_mean=-1.2, p_std=1.2)


@pytest.fixture(autouse=True, scope="module")
def few() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gaussian_stages, "RESAMPLES", 20)
        yield


@pytest.fixture(scope="module")
def result() -> StageResult:
    return compute_stages(IMAGES, SETTINGS, fingerprint="abc")


def edm(data: float) -> Any:
    return lambda s: (data**2 / (s**2 + data**2), s * data / (s**2 + data**2).sqrt())


def test_edges_are_those_of_the_images_covariance_and_standard_deviation(result: StageResult) -> None:
    pixels = torch.from_numpy(IMAGES).double() / 127.5 - 1
    moments = measure_moments(pixels)
    std = float((pixels - pixels.mean(0)).square().sum() / (len(pixels) - 1) / 64) ** 0.5
    expected = gaussian_edges(moments.spectrum(), PRIOR, edm(std), 3)
    np.testing.assert_allclose(result.edges_sigma, expected, rtol=1e-9)
    assert result.diffusion == DiffusionConfig(precondition="edm", sigma_data=result.diffusion.sigma_data, prior=PRIOR)
    assert result.diffusion.sigma_data == pytest.approx(std, rel=1e-9)
    assert (result.samples, result.rule, result.fingerprint) == (1797, "gaussian", "abc")
    half = gaussian_edges(
        measure_moments(pixels[torch.randperm(1797, generator=torch.Generator().manual_seed(0))][:898]).spectrum(),
        PRIOR,
        edm(std),
        3,
    )
    np.testing.assert_allclose(result.curves["half_edges_sigma"], half, rtol=1e-9)


def test_every_stage_has_its_share_of_the_noise(result: StageResult) -> None:
    shares = [PRIOR.mass(*result.stages().interval(k)) for k in range(3)]
    assert min(shares) > 0.2  # not 3.6 % or less, as by the optimal denoiser


def test_intervals_hold_the_edges_and_are_narrow(result: StageResult) -> None:
    for edge, (low, high) in zip(result.edges_sigma, result.intervals_sigma, strict=True):
        assert low < edge < high < 1.1 * low


def test_floats_in_the_range_are_as_pixels(result: StageResult) -> None:
    found = compute_stages(torch.from_numpy(IMAGES).float() / 127.5 - 1, SETTINGS)
    np.testing.assert_allclose(found.edges_sigma, result.edges_sigma, rtol=1e-6)


def test_other_densities_and_preconditionings_move_the_edges(result: StageResult) -> None:
    noisier = DiffusionConfig(precondition="edm", prior=LogNormal(p_mean=0.0, p_std=1.2))
    higher = compute_stages(IMAGES, SETTINGS, diffusion=noisier)
    assert min(np.divide(higher.edges_sigma, result.edges_sigma)) > 1.3
    paper = compute_stages(IMAGES, SETTINGS, diffusion=DiffusionConfig())
    assert paper.diffusion == DiffusionConfig()
    assert paper.edges_sigma != result.edges_sigma


def test_the_density_may_be_proposed_by_the_images(result: StageResult) -> None:
    found = compute_stages(IMAGES, dataclasses.replace(SETTINGS, density="auto"))
    assert isinstance(found.diffusion.prior, LogNormal)
    assert [found.diffusion.prior.p_mean, found.diffusion.prior.p_std] == result.curves["proposed_density"]
    given = compute_stages(IMAGES, SETTINGS, diffusion=found.diffusion)
    assert given.edges_sigma == found.edges_sigma != result.edges_sigma


def test_a_table_shows_all_numbers_of_stages(result: StageResult) -> None:
    table = result.curves["table"]
    assert [line["stages"] for line in table] == list(range(1, 9))
    distances = [line["distance"] for line in table]
    assert distances == sorted(distances, reverse=True)
    np.testing.assert_allclose(table[2]["edges_sigma"], result.edges_sigma, rtol=1e-12)
    for stages in (1, 2, 5):
        found = compute_stages(IMAGES, dataclasses.replace(SETTINGS, stages=stages))
        np.testing.assert_allclose(found.edges_sigma, table[stages - 1]["edges_sigma"], rtol=1e-12)
        assert len(found.intervals_sigma) == stages - 1


def test_memory_bounds_the_images(result: StageResult) -> None:
    found = compute_stages(IMAGES, SETTINGS, memory=500 * 16 * 64)
    assert found.samples == 500
    np.testing.assert_allclose(found.edges_sigma, result.edges_sigma, rtol=0.05)
    assert compute_stages(IMAGES, dataclasses.replace(SETTINGS, samples=100)).samples == 100


def test_latents_have_stages_too() -> None:
    latents = 3.0 * np.random.default_rng(0).standard_normal((100, 4, 4, 4)).astype(np.float32)
    latents *= np.arange(1, 17).reshape(4, 4) ** -0.5
    settings = dataclasses.replace(SETTINGS, data_range=None)
    found = compute_stages(latents, settings, schedule=EDM(), codec="def", scale=0.5)
    assert (found.codec, found.scale, found.strip) == ("def", 0.5, "")


def test_white_noise_has_stages_but_proposes_no_density() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (4000, 1, 2, 2), dtype=np.uint8)
    white = np.concatenate([noise, 255 - noise])  # of mean 0 exactly
    found = compute_stages(white, SETTINGS)
    assert len(found.edges_sigma) == 2


def test_it_is_stored_and_drawn(result: StageResult, tmp_path: Path) -> None:
    result.save(tmp_path / "stages.json")
    assert StageResult.load(tmp_path / "stages.json") == result
    assert decode_png(result.strip).shape == (3 * 12, 8 * 12)
    plot_stages(result, tmp_path / "stages.png")
    picture = np.asarray(Image.open(tmp_path / "stages.png").convert("RGB")).astype(int)
    for stage in range(3):
        colour = np.array([int(palette.stage_colour(stage)[i : i + 2], 16) for i in (1, 3, 5)])
        assert (abs(picture - colour).max(-1) < 8).sum() > 300  # the stage's frame


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": 1}, "algorithm=1: denoiser gaussian needs algorithm 2"),
        ({"precision": 0.01}, r"precision=0\.01: denoiser gaussian"),
        ({"space": "eps"}, "space=eps: denoiser gaussian"),
        ({"denoiser": "wiener"}, "denoiser='wiener' must be one of optimal, gaussian"),
        ({"density": "wide"}, "density='wide' must be one of given, auto"),
        ({"algorithm": 2, "denoiser": "optimal", "density": "auto"}, "density=auto: only denoiser gaussian"),
        ({"stages": 500}, "stages=500 must be between 1 and the 400 noise levels"),
    ],
)
def test_settings_that_do_not_apply_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_stages(IMAGES, dataclasses.replace(SETTINGS, **changes))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:10], "10 images are too few for a covariance"),
        (np.repeat(IMAGES[:1], 40, axis=0), "all 40 images are the same"),
        (np.full((40, 1, 4, 4), np.nan, np.float32), "NaN or infinite|outside data_range"),
        (np.full((40, 1, 4, 4), 7.0, np.float32), "outside data_range"),
    ],
)
def test_images_that_have_no_stages_are_refused(images: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute_stages(images, SETTINGS)
