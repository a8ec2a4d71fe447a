"""Probes differ in width alone, and their losses are those of training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from multistage_diffusion.config import RunConfig
from multistage_diffusion.config.presets import preset
from multistage_diffusion.config.serialization import override
from multistage_diffusion.contracts import Conditioning
from multistage_diffusion.data import to_float
from multistage_diffusion.data.sources import open_configured
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.optimal import OptimalDenoiser
from multistage_diffusion.training.batches import BatchSource, held_out_batch
from multistage_diffusion.training.checkpoint import load_tensors
from multistage_diffusion.training.losses import stage_losses
from multistage_diffusion.training.trainer import Trainer
from multistage_diffusion.workflow import probes
from multistage_diffusion.workflow.resolve import PreparedRun

TINY = {
    "network.encoder_width": 8,
    "network.decoder_widths": [16, 8, 8],
    "network.channel_mult": [1],
    "network.attention_factors": [],
    "training.batch": 12,
    "training.held_out_rows": 4,
    "sampling.calls": 6,
}


def tiny(**changes: Any) -> RunConfig:
    return override(preset("digits"), {**TINY, **{key.replace("__", "."): value for key, value in changes.items()}})


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "ROWS", 40)


def material_of(config: RunConfig) -> PreparedRun:
    parts = open_configured(config.data).split(config.data.held_out)
    return PreparedRun(config=config, parts=parts)


def test_probes_see_the_same_rows_and_differ_in_width_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[RunConfig, list[torch.Tensor]]] = []
    draw = BatchSource.draw

    def spy(self: BatchSource, *arguments: Any) -> Any:
        batch = draw(self, *arguments)
        seen[-1][1].extend([batch.y, batch.noise, batch.sigma])
        return batch

    fit = Trainer.fit

    def fitted(self: Trainer) -> None:
        seen.append((self.config, []))
        fit(self)

    monkeypatch.setattr(BatchSource, "draw", spy)
    monkeypatch.setattr(Trainer, "fit", fitted)
    told: list[tuple[int, int]] = []
    base = tiny(training__ema_rampup=0.0)
    losses = probes.probed(
        material_of(base), (8, 16), 3, torch.device("cpu"), lambda done, total: told.append((done, total))
    )
    (narrow, few), (wide, many) = seen
    assert len(few) == 9
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))
    assert (narrow.network.decoder_widths, wide.network.decoder_widths) == ((8, 8, 8), (16, 16, 16))
    assert dataclasses.replace(narrow, network=wide.network, name=wide.name) == wide
    assert narrow.network.encoder_width == base.network.encoder_width
    assert (narrow.training.steps, narrow.optimizer.warmup_steps) == (3, 0)
    assert narrow.training.ema_rampup > 0
    assert told == [(done, 6) for done in range(1, 7)]
    assert [[len(rows) for rows in stages] for stages in losses] == [[40] * 3] * 2
    assert not torch.equal(losses[0][0], losses[1][0])


def test_row_losses_are_those_of_training(tiny_config: Any, tiny_data: Any) -> None:
    config = tiny_config(network__num_classes=3, training__held_out_rows=10)
    torch.manual_seed(0)
    denoiser = build_denoiser(config).eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.2)
    for stage in range(3):
        batch = held_out_batch(config, tiny_data(7, classes=3), stage, torch.device("cpu"))
        rows = probes.held_out_row_losses(denoiser, batch, 4)
        assert rows.dtype == torch.float64
        assert len(rows) == 10
        with torch.no_grad():
            assert float(rows.sum()) == pytest.approx(float(stage_losses(denoiser, batch)[stage]), rel=1e-5)
        for i in (0, 9):
            alone = held_row(batch, i, stage)
            with torch.no_grad():
                assert float(rows[i]) == pytest.approx(float(stage_losses(denoiser, alone)[stage]), rel=1e-4)


def held_row(batch: Any, i: int, stage: int) -> Any:
    return dataclasses.replace(
        batch,
        y=batch.y[i : i + 1],
        noise=batch.noise[i : i + 1],
        sigma=batch.sigma[i : i + 1],
        counts=tuple(int(k == stage) for k in range(len(batch.counts))),
        cond=Conditioning(labels=batch.cond.labels[i : i + 1]),
    )


@pytest.mark.parametrize("precondition", ["edm", "velocity"])
def test_the_optimal_loss_is_in_the_units_of_the_network(tiny_config: Any, tiny_data: Any, precondition: str) -> None:
    config = tiny_config(diffusion__precondition=precondition)
    images = to_float(tiny_data(20).tensor())
    optimal = OptimalDenoiser(images)
    batch = held_out_batch(config, tiny_data(6, seed=1), 2, torch.device("cpu"))
    denoiser = build_denoiser(config)
    # a network whose output made D the posterior mean: F = (D - c_skip x) / c_out
    x = batch.y + batch.sigma.float()[:, None, None, None] * batch.noise
    c = denoiser.preconditioning.coefficients(batch.sigma)
    column = (-1, 1, 1, 1)
    perfect = (optimal(x, batch.sigma).double() - c.skip.reshape(column) * x) / c.out.reshape(column)
    target = denoiser.preconditioning.target(batch.y, batch.noise, batch.sigma)
    wanted = (perfect - target).square().flatten(1).mean(1)
    found = probes.optimal_row_losses(config, optimal, batch)
    assert torch.allclose(found, wanted, rtol=1e-3)


def test_too_many_images_have_no_optimal_denoiser(monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = material_of(tiny())
    known = probes.optimal_losses(prepared, torch.device("cpu"))
    assert all(loss is not None and loss > 0 for loss in known)
    monkeypatch.setattr(probes, "MEMORY", 4 * len(prepared.parts[0]) * 64 - 1)
    assert probes.optimal_losses(prepared, torch.device("cpu")) == [None] * 3


def test_trained_weights_are_compared_as_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    fit = Trainer.fit

    def fitted(self: Trainer) -> None:
        fit(self)
        kept.append(load_tensors(sorted(self.run.checkpoints.iterdir())[-1], "ema"))

    monkeypatch.setattr(Trainer, "fit", fitted)
    config = tiny()
    prepared = material_of(config)
    losses = probes.probed(prepared, (8,), 3, torch.device("cpu"), lambda *_: None)
    denoiser = build_denoiser(probes.probe_config(config, 8, 3)).eval()
    denoiser.load_state_dict(kept[0])
    rows = dataclasses.replace(config, training=dataclasses.replace(config.training, held_out_rows=40))
    for stage in range(3):
        batch = held_out_batch(rows, prepared.parts[1], stage, torch.device("cpu"))
        assert torch.allclose(probes.held_out_row_losses(denoiser, batch, 12), losses[0][stage])
