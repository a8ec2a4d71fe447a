from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from tiny import tiny_config, tiny_data
from torch import nn

from multistage_diffusion.config.serialization import read_json
from multistage_diffusion.denoisers import build_denoiser
from multistage_diffusion.errors import UserError
from multistage_diffusion.training.batches import BatchSource
from multistage_diffusion.training.checkpoint import load_tensors, restore_module
from multistage_diffusion.training.loss_weighting import LearnedWeighting
from multistage_diffusion.training.losses import objective, row_losses, stage_sums
from multistage_diffusion.training.run import Run
from multistage_diffusion.training.trainer import Trainer

CPU = torch.device("cpu")


def weighting(**changes: object) -> LearnedWeighting:
    return LearnedWeighting(tiny_config(training__precision="fp64", **changes), CPU)


def drawn(made: LearnedWeighting, seed: int = 0) -> LearnedWeighting:
    """Give it random coefficients."""
    generator = torch.Generator().manual_seed(seed)
    made.weight.data.copy_(0.05 * torch.randn(made.weight.shape, generator=generator))
    return made


def features(made: LearnedWeighting, sigma: torch.Tensor) -> torch.Tensor:
    """Return the features (B, 128): u of each unit vector of coefficients."""
    made.weight = nn.Parameter(torch.eye(len(made.weight), dtype=torch.float64))
    return made.log_variance(sigma).detach()


SIGMA = torch.logspace(-2, 1.5, 40, dtype=torch.float64)
LOSSES = SIGMA.sqrt() + 0.1


# -- u ----------------------------------------------------------------------------------------------------------------


def test_losses_are_as_they_are_at_first():
    assert torch.equal(weighting()(LOSSES, SIGMA), LOSSES)


def test_the_weighted_loss_written_out():
    made = drawn(weighting())
    u = features(weighting(), SIGMA) @ made.weight
    torch.testing.assert_close(made.log_variance(SIGMA), u)
    torch.testing.assert_close(made(LOSSES, SIGMA), LOSSES * torch.exp(-u) + u)


def test_features_have_the_gaussian_kernel_of_a_quarter_of_ln_sigma():
    sigma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    found = torch.cat([features(weighting(training__seed=seed), sigma) for seed in range(20)], 1)
    expected = [math.exp(-((2 * math.pi * math.log(ratio) / 4) ** 2) / 2) for ratio in (1.0, 2.0, 4.0)]
    # products of two features have a variance of at most 1.5
    tolerance = 4 * math.sqrt(1.5 / found.shape[1])
    assert (found[0] * found).mean(1).tolist() == pytest.approx(expected, abs=tolerance)


def test_features_are_of_the_seed():
    first, again, other = (features(weighting(training__seed=seed), SIGMA[:2]) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_gradient_of_u_is_one_less_the_weighted_loss():
    made = drawn(weighting())
    made(LOSSES, SIGMA).sum().backward()
    slope = 1 - LOSSES * torch.exp(-made.log_variance(SIGMA))
    torch.testing.assert_close(made.weight.grad, (features(weighting(), SIGMA).T @ slope).detach())


def test_u_tends_to_the_logarithm_of_the_expected_loss():
    made = weighting(optimizer__lr=0.02)
    expected = 0.01 + SIGMA**2 / (1 + SIGMA**2)
    losses, sigma = torch.cat([0.2 * expected, 1.8 * expected]), SIGMA.repeat(2)
    for _ in range(500):
        made.optimizer.zero_grad()
        made(losses, sigma).mean().backward()
        made.optimizer.step()
    torch.testing.assert_close(made.log_variance(SIGMA).exp(), expected, rtol=0.03, atol=0)


def test_weight_decay_is_the_network_s_alone():
    changes = {"optimizer__kind": "adamw", "optimizer__lr": 0.3}
    (group,) = weighting(**changes, optimizer__weight_decay=0.5).optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.3, 0.0)


# -- the objective ----------------------------------------------------------------------------------------------------


def test_each_row_s_gradient_is_divided_by_exp_u():
    config, counts, lambdas = tiny_config(network__dropout=0.0), (2, 0, 3), (0.5, 0.3, 0.2)
    torch.manual_seed(0)
    denoiser, made = build_denoiser(config).double(), drawn(weighting())
    batch = BatchSource(config, tiny_data(), CPU).draw(0, counts)
    rows = row_losses(denoiser, batch)
    scales = [0.5 / 2] * 2 + [0.2 / 3] * 3
    parameters = list(denoiser.parameters())
    expected = [torch.zeros_like(p) for p in parameters]
    for row, scale, u in zip(rows, scales, made.log_variance(batch.sigma).tolist(), strict=True):
        own = torch.autograd.grad(row, parameters, retain_graph=True, materialize_grads=True)
        torch._foreach_add_(expected, own, alpha=scale * math.exp(-u))
    whole = objective(stage_sums(made(rows, batch.sigma), counts, (True,) * 3), lambdas, counts)
    found = torch.autograd.grad(whole, parameters, materialize_grads=True)
    for gradient, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


# -- training ---------------------------------------------------------------------------------------------------------


def trained(path: Path, **changes: object) -> Trainer:
    """Train a run that is there to its end, or a new one, without dropout; the learned weights are in use."""
    config = tiny_config(**{"network__dropout": 0.0, "training__loss_weighting": "learned", **changes})
    trainer = Trainer(Run(path) if path.exists() else Run.create(path, config), tiny_data(), config=config, device=CPU)
    trainer.fit()
    return trainer


def stored(trainer: Trainer, name: str) -> dict[str, torch.Tensor]:
    return load_tensors(trainer.run.checkpoint("latest"), name)


def learned(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Return what a run's checkpoint holds of u."""
    return {k: t for k, t in stored(trainer, "optimizer").items() if k.startswith("loss_weighting.")}


def require_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, **tolerance)


def test_fixed_losses_have_the_gradient_of_their_means_bit_for_bit(tmp_path):
    config = tiny_config(network__dropout=0.0)
    trainer = Trainer(Run.create(tmp_path / "run", config), tiny_data(), device=CPU)
    counts, lambdas = trainer.allocation.counts, trainer.allocation.weights
    parts = row_losses(trainer.denoiser, trainer.passes.source.draw(0, counts)).split(counts)
    means = [w / c * part.sum() for part, w, c in zip(parts, lambdas, counts, strict=True)]
    expected = torch.autograd.grad(torch.stack(means).sum(), list(trainer.denoiser.parameters()))
    trainer.passes.gradients(0, counts, lambdas)
    assert all(torch.equal(p.grad, g) for p, g in zip(trainer.denoiser.parameters(), expected, strict=True))
    assert len(trainer.optimization.optimizers) == 1
    trainer.fit()
    assert not learned(trainer)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_first_step_of_the_network_is_the_ordinary_one(tmp_path, clip):
    """Neither the gradient of u nor its norm has a part in the network's."""
    runs = [
        trained(tmp_path / kind, training__loss_weighting=kind, training__steps=1, optimizer__clip=clip)
        for kind in ("fixed", "learned")
    ]
    fixed, other = (stored(run, "model") for run in runs)
    assert all(torch.equal(other[name], value) for name, value in fixed.items())
    logs = [[(r["loss"], r["grad_norm"]) for r in run.run.records()] for run in runs]
    assert logs[0] == logs[1]
    assert learned(runs[1])["loss_weighting.weight"].abs().min() > 0


def test_logged_losses_are_not_weighted_and_weights_are_of_the_network_alone(tmp_path):
    trainer = trained(tmp_path / "run", training__steps=3, optimizer__lr=0.01)
    counts = trainer.allocation.counts
    restore_module(trainer.denoiser, trainer.run.checkpoint("latest"), "model")
    assert trainer.optimization.weighting.weight.abs().max() > 0.02
    batch = trainer.passes.source.draw(3, counts)
    sums = [part.sum().item() for part in row_losses(trainer.denoiser, batch).split(counts)]
    assert trainer.passes.gradients(3, counts, trainer.allocation.weights).tolist() == pytest.approx(sums, rel=1e-6)
    for name in ("model", "ema"):
        assert stored(trainer, name).keys() == trainer.denoiser.state_dict().keys()
    for record in trainer.run.records():
        assert record["grad_norm"].keys() == {"encoder", "decoder.1", "decoder.2", "decoder.3"}


@pytest.mark.parametrize("mode", ["mixed", "one-stage", "sequential"])
def test_u_is_learned_in_every_mode_by_accumulated_parts_and_threads(tmp_path, mode):
    changes = {"training__update_mode": mode, "training__precision": "fp64", "training__steps": 3}
    one = trained(tmp_path / "one", **changes)
    two = trained(tmp_path / "two", **changes, training__accumulate=3, execution__thread_parallel=2)
    assert int(learned(one)["loss_weighting.weight.step"]) == (9 if mode == "sequential" else 3)
    require_close(learned(one), learned(two), rtol=1e-7, atol=1e-11)


def test_the_gradient_of_u_is_unscaled(tmp_path):
    runs = [
        trained(tmp_path / precision, training__precision=precision, training__steps=1)
        for precision in ("fp16", "fp32")
    ]
    half, single = (learned(run)["loss_weighting.weight.exp_avg"] for run in runs)
    torch.testing.assert_close(half, single, rtol=0.02, atol=1e-4)


def test_branching_goes_on_with_u(tmp_path):
    trainer = trained(tmp_path / "run", network__decoder_widths=(8, 8, 8), training__branch_at=2, training__steps=4)
    assert int(learned(trainer)["loss_weighting.weight.step"]) == 4


# -- checkpoints ------------------------------------------------------------------------------------------------------


def files(trainer: Trainer) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(trainer.run.checkpoint("latest").iterdir())}


def test_checkpoints_from_before_the_setting_go_on_bit_for_bit(tmp_path):
    whole = trained(tmp_path / "whole", training__loss_weighting="fixed")
    early = trained(tmp_path / "early", training__loss_weighting="fixed", training__steps=2)
    for file in (early.run.path / "config.json", early.run.checkpoint("latest") / "state.json"):
        data = read_json(file)
        del data.get("config", data)["training"]["loss_weighting"]
        file.write_text(json.dumps(data))
    assert files(trained(tmp_path / "early", training__loss_weighting="fixed")) == files(whole)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("learned", "fixed", r"it holds loss_weighting\.weight.*, which the network does not have"),
        ("fixed", "learned", r"loss_weighting\.weight is missing"),
    ],
)
def test_another_weighting_does_not_go_on(tmp_path, before, after, message):
    trained(tmp_path / "run", training__loss_weighting=before, training__steps=2)
    with pytest.raises(UserError, match=rf"optimizer\.safetensors: .*{message}"):
        trained(tmp_path / "run", training__loss_weighting=after)
