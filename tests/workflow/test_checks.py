"""Checks and warnings before a run."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from multistage_diffusion.config.serialization import from_dict, to_dict
from multistage_diffusion.data import ImageData, to_float
from multistage_diffusion.data.rows import ArrayRows
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.schedules import LogNormal
from multistage_diffusion.stage_finding import StageSettings, compute_stages
from multistage_diffusion.stages import Stages
from multistage_diffusion.workflow.auto import auto_config
from multistage_diffusion.workflow.checks import (
    LEAST_DEVIATION,
    LEAST_HELD_OUT,
    SAMPLED,
    sample_std,
    warn_of_branching,
    warn_of_density,
    warn_of_few,
    warn_of_sigma_data,
    warn_of_starved,
)


@pytest.mark.parametrize("count", [2, 7, 300])
def test_the_standard_deviation_is_that_of_the_pixels_about_the_mean_image(tiny_data: Any, count: int) -> None:
    data = tiny_data(count)
    pixels = to_float(data.tensor()).double()
    assert sample_std(data) == pytest.approx(float(pixels.std(0, correction=0).square().mean().sqrt()), rel=1e-6)


def test_images_on_one_background_are_not_told_another_sigma_data_than_is_chosen_for_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    backdrop = np.repeat(np.array([0, 255], np.uint8), 32).reshape(1, 8, 8)  # varies much more than what differs
    images = np.clip(backdrop + rng.integers(-20, 20, (40, 8, 8)), 0, 255).astype(np.uint8)
    np.save(tmp_path / "posed.npy", images)
    config = auto_config(str(tmp_path / "posed.npy"), device="cpu").config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_sigma_data(config, "images", sample_std(open_data(str(tmp_path / "posed.npy"))))


def test_images_that_hardly_differ_have_a_sigma_data() -> None:
    assert sample_std(ImageData(ArrayRows(np.full((40, 1, 8, 8), 7, np.uint8)), None, "same")) == LEAST_DEVIATION


def test_of_many_images_some_are_read_from_all_over() -> None:
    class Watched(ArrayRows):
        read: list[int] = []  # noqa: RUF012

        def rows(self, indices: Any) -> Any:
            self.read.extend(indices.tolist())
            return super().rows(indices)

    dark_then_bright = np.repeat(np.array([0, 255], np.uint8), 2 * SAMPLED)[:, None, None, None]
    assert sample_std(ImageData(Watched(dark_then_bright), None, "sorted")) == pytest.approx(1.0, abs=1e-3)
    assert len(set(Watched.read)) == len(Watched.read) == SAMPLED
    assert (min(Watched.read), max(Watched.read)) == (0, 4 * SAMPLED - 1)


EDM = {"diffusion__precondition": "edm", "diffusion__prior": LogNormal(p_mean=-1.2, p_std=1.2)}


@pytest.mark.parametrize(
    ("edges", "changes", "named"),
    [
        ((2.6, 10.6), {"training__update_mode": "one-stage"}, ["stage 3 (sigma 10.6 to inf) gets 0.15%"]),
        ((9.0, 15.6), {"training__update_mode": "one-stage"}, ["stage 2 (sigma 9 to 15.6) gets 0.18%", "stage 3"]),
        ((0.17, 0.59), {"training__update_mode": "one-stage"}, []),
        ((9.0, 15.6), {"training__batch": 64}, ["stage 2 (sigma 9 to 15.6) gets 1.56%", "stage 3"]),  # a row each
        ((9.0, 15.6), {"training__shares": "uniform"}, []),
    ],
)
def test_stages_without_rows_are_named(
    tiny_config: Any, edges: tuple[float, ...], changes: dict[str, Any], named: list[str]
) -> None:
    config = tiny_config(**{"stages": Stages(edges), "training__shares": "prior", **EDM, **changes})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_starved(config)
    assert len(caught) == len(named)
    for warning, words in zip(caught, named, strict=True):
        assert words in str(warning.message)
        assert "--denoiser gaussian" in str(warning.message)


def test_stages_of_another_density_are_warned_of(tiny_config: Any, tiny_data: Any) -> None:
    settings = StageSettings(algorithm=2, denoiser="gaussian", samples=100)
    result = compute_stages(tiny_data(60).tensor(), settings)
    stages = from_dict(Stages, json.loads(json.dumps(to_dict(result.stages()))))  # as in a run's config.json
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_density(tiny_config(**EDM, stages=stages))
    other = tiny_config(**(EDM | {"diffusion__prior": LogNormal(p_mean=0.0, p_std=1.2)}), stages=stages)
    with pytest.warns(UserWarning, match="p_mean -1.2, p_std 1.2.*but this run trains with edm and .*p_mean 0.0"):
        warn_of_density(other)


@pytest.mark.parametrize(("std", "warned"), [(0.2, True), (0.25, False), (1.0, False), (1.01, True), (0.0, True)])
@pytest.mark.parametrize("what", ["images", "latents"])
def test_a_sigma_data_off_by_more_than_a_factor_of_two_is_named(
    tiny_config: Any, std: float, warned: bool, what: str
) -> None:
    config = tiny_config(**{**EDM, "diffusion__sigma_data": 0.5})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_sigma_data(config, what, std)
        warn_of_sigma_data(tiny_config(diffusion__precondition="vp-eps"), what, std)  # has no use for it
    assert [str(w.message) for w in caught] == [
        f"diffusion.sigma_data=0.5, but the {what}' standard deviation is {std:.2g}; consider --set "
        f"diffusion.sigma_data={std:.2g}"
    ] * warned


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ((1000, LEAST_HELD_OUT), None),
        ((40, 0), None),  # as asked for
        ((105, LEAST_HELD_OUT - 1), "15 images held out: .*such as 0.2$"),
        ((20, 2), "2 images held out: .*more images would mend that"),
    ],
)
def test_too_few_held_out_images_are_named(tiny_data: Any, sizes: tuple[int, int], words: str | None) -> None:
    images = tiny_data(max(1, sum(sizes)))
    parts = images.subset(range(sizes[0])), images.subset(range(sizes[0], sum(sizes)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_few(*parts)
    assert len(caught) == (words is not None)
    if words:
        assert re.search(words, str(caught[0].message))


def test_a_training_that_ends_before_its_stages_part_is_warned_of(tiny_config: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_branching(tiny_config(training__branch_at=3, training__steps=4).training)
    with pytest.warns(UserWarning, match=r"training\.branch_at=4: all stages train one decoder to the end, step 4"):
        warn_of_branching(tiny_config(training__branch_at=4, training__steps=4).training)
