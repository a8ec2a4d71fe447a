"""Transformers train as other networks do: labels, augmentation, every preconditioning, exact resume, sampling with guidance."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.data.sources import open_configured
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.losses import stage_losses
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow.sample import sample

FAMILIES = ["dit", "uvit"]
SMALL = {
    "network__encoder_depth": 1,
    "network__decoder_depths": (1, 2, 1),
    "network__head_channels": 4,
    "network__size": (4, 4),
}
VP_PRIOR = {"kind": "uniform-time", "schedule": {"kind": "vp"}}
PRECONDITIONINGS: dict[str, dict[str, Any]] = {
    "edm": {},
    "vp-eps": {"diffusion": {"precondition": "vp-eps", "schedule": {"kind": "vp"}, "prior": VP_PRIOR}},
    "velocity": {"diffusion__precondition": "velocity", "diffusion__schedule": {"kind": "rectified-flow"}},
}


@pytest.fixture
def small(tiny_config):
    def make(family: str, **changes: object) -> RunConfig:
        classes = {"network__num_classes": 5, "training__label_dropout": 0.3}
        augmented = {"network__augment_dim": 9, "training__augment": 0.5}
        return tiny_config(**{"network__family": family, **SMALL, **classes, **augmented, **changes})

    return make


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.denoiser.state_dict(), **{f"ema.{k}": v for k, v in trainer.ema.module.state_dict().items()}}


@pytest.mark.parametrize("precondition", PRECONDITIONINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_stopped_run_reaches_the_same_bits(small, tiny_data, tmp_path, family, precondition) -> None:
    data, config = tiny_data(classes=5), small(family, network__dropout=0.1, **PRECONDITIONINGS[precondition])
    whole = Trainer(Run.create(tmp_path / "whole", config), data, device="cpu")
    first = {name: value.clone() for name, value in weights(whole).items()}
    whole.fit()
    half = override(config, {"training.steps": 2})
    Trainer(Run.create(tmp_path / "part", half), data, device="cpu").fit()
    again = Trainer(Run(tmp_path / "part"), data, config=config, device="cpu")
    again.fit()
    ours, theirs = weights(again), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(not torch.equal(first[name], theirs[name]) for name in first)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_learns_from_the_labels_of_its_rows(small, tiny_data, family) -> None:
    config = small(family)
    torch.manual_seed(0)
    denoiser = build_denoiser(config)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # gates start at zero
    batch = BatchSource(config, tiny_data(4, classes=4), torch.device("cpu")).draw(0, (2, 2, 2))
    shown = sorted({label if label >= 0 else 5 for label in batch.cond.labels.tolist()})
    assert 5 in shown
    sum(stage_losses(denoiser, batch)).backward()
    embedding = denoiser.network.encoders[0].embedding
    table = embedding.label.table if family == "uvit" else embedding.label
    assert table.weight.grad.abs().sum(1).nonzero()[:, 0].tolist() == shown  # the last row stands for hidden labels
    told = batch.cond.augment.abs().sum(0).ne(0)
    assert torch.equal(embedding.augment.weight.grad.abs().sum(0).ne(0), told)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_and_recomputing_train(small, tiny_data, tmp_path, family) -> None:
    plain = small(family, network__dropout=0.0)
    losses = {}
    for name, changes in {
        "plain": {},
        "recompute": {"execution.recompute": True},
        "bf16": {"training.precision": "bf16"},
        "threads": {"execution.thread_parallel": 2},
    }.items():
        trainer = Trainer(Run.create(tmp_path / name, override(plain, changes)), tiny_data(classes=5), device="cpu")
        trainer.fit()
        losses[name] = [record["loss"] for record in trainer.run.records() if record["kind"] == "train"]
    np.testing.assert_allclose(losses["recompute"], losses["plain"], rtol=1e-6)
    np.testing.assert_allclose(losses["threads"], losses["plain"], rtol=1e-5)
    np.testing.assert_allclose(losses["bf16"], losses["plain"], rtol=0.05)
    assert losses["bf16"] != losses["plain"]


@pytest.mark.parametrize("family", FAMILIES)
def test_guided_samples_of_odd_sizes(small, tiny_data, tmp_path, family) -> None:
    config = small(family, data__shape=(1, 5, 7), network__augment_dim=0, training__augment=0.0, optimizer__lr=0.05)
    run = Run.create(tmp_path / "run", config)
    Trainer(run, tiny_data(classes=5, shape=(1, 5, 7)), device="cpu").fit()
    plain, guided = (
        sample(run, 3, label=2, device="cpu", sampling=dataclasses.replace(config.sampling, guidance=scale))
        for scale in (1.0, 3.0)
    )
    assert plain.shape == guided.shape == (3, 1, 5, 7)
    assert not torch.equal(plain, guided)


@pytest.mark.slow
def test_the_preset_of_digits_learns(tmp_path) -> None:
    """Sixty steps, of 3600, take the loss of every stage well below that of a network that knows nothing, about 1."""
    config = override(
        preset("digits-uvit"),
        {"training.steps": 60, "training.held_out_every": 0, "training.sample_every": 0, "optimizer.warmup_steps": 20},
    )
    data, held_out = open_configured(config.data).split(config.data.held_out)
    trainer = Trainer(Run.create(tmp_path / "run", config), data, held_out, device="cpu")
    before = trainer.held_out_losses()
    trainer.fit()
    assert all(late < 0.85 * early for late, early in zip(trainer.held_out_losses(), before, strict=True))
