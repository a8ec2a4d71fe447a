"""Faster ways of computing agree with float32 as PyTorch computes it when nothing is asked for: in training and in sampling."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.data.sources import open_data
from multistage_diffusion.evaluation import frechet_between, get_features, image_moments
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.sample import sample

STEPS = 200
WAYS = {
    "bf16": {"training__precision": "bf16"},
    "channels-last": {"execution__channels_last": True},
    "compiled": {"execution__compile": True},
    "compiled channels-last": {"execution__compile": True, "execution__channels_last": True},
    "threads": {"execution__thread_parallel": 2},
}


@pytest.fixture(scope="module", name="trained")
def fixture_trained(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., RunConfig]):
    """Train a small network on digits in a way; return its run."""
    pytest.importorskip("sklearn")
    data, runs = open_data("digits"), {}

    def train(name: str, *, steps: int = STEPS, **changes: object) -> Run:
        if name not in runs:
            settings = {
                "data__shape": [1, 8, 8],
                "network__decoder_widths": [12, 12, 12],
                "training__steps": steps,
                "training__batch": 48,
                "training__ema_halflife": 2000.0,
                "training__precision": "fp32",
            }
            config = tiny_config(**settings | changes)
            runs[name] = Run.create(tmp_path_factory.mktemp("numerics") / "run", config)
            Trainer(runs[name], data, device="cpu").fit()
        return runs[name]

    return train


def losses(run: Run) -> np.ndarray:
    """Return the losses of every step and stage."""
    return np.array([record["loss"] for record in run.records() if record["kind"] == "train"])


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_loss_curves_agree_within_their_noise(trained: Callable[..., Run], way: str) -> None:
    """Rows and noise are the same, so that rounding is all that differs: mean losses by a part of their standard error."""
    same = {"network__dropout": 0.0} if way == "threads" else {}  # each thread drops units of its own
    plain = losses(trained("plain without dropout" if same else "plain", **same))
    other = losses(trained(way, **WAYS[way], **same))
    assert plain.shape == other.shape == (STEPS, 3)
    assert not np.array_equal(plain, other)  # it was computed otherwise
    first = np.abs(other[:10] / plain[:10] - 1).max()
    assert first < (0.002 if way == "bf16" else 1e-5)
    for half in (slice(0, STEPS // 2), slice(STEPS // 2, STEPS)):
        noise = plain[half].std(0, ddof=1) / np.sqrt(STEPS // 2)
        difference = np.abs(other[half].mean(0) - plain[half].mean(0))
        assert (difference < (0.2 if way == "bf16" else 0.01) * noise).all()


@pytest.mark.slow
def test_sampling_in_bf16_changes_the_frechet_distance_by_less_than_its_standard_error(
    trained: Callable[..., Run],
) -> None:
    run = trained("long", steps=1500)
    pixels = get_features("pixels")
    real = image_moments(pixels, open_data("digits").tensor(), device=torch.device("cpu"))

    def distance(seed: int, precision: str) -> float:
        images = sample(run, 1000, seed=seed, checkpoint="latest", precision=precision)
        return frechet_between(image_moments(pixels, images, device=torch.device("cpu")), real)

    full = np.array([distance(seed, "fp32") for seed in range(4)])
    reduced = np.array([distance(seed, "bf16") for seed in range(4)])
    assert not np.array_equal(full, reduced)
    assert np.abs(reduced - full).max() < full.std(ddof=1)  # of one distance of 1000 samples
